"""The GLoRA of the real LyCORIS computes what ours does with its tensors."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from lycoris.modules.glora import GLoRAModule
from torch import Tensor, nn

import adapters
from adapters import LycorisGLoRA

LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(4, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), lambda: torch.randn(4, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), lambda: torch.randn(2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, (3, 2), padding=1, dilation=2), lambda: torch.randn(2, 4, 7, 7)),
    "conv2d of kernel 1": (lambda: nn.Conv2d(4, 6, 1), lambda: torch.randn(2, 4, 3, 3)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3)), lambda: torch.randn(2, 2, 3, 4, 5)),
}


def pair(name: str, **options: float) -> tuple[nn.Module, GLoRAModule, Tensor]:
    """A layer, LyCORIS' adapter of it with random tensors, and an input."""
    make, sample = LAYERS[name]
    layer = make().double()
    theirs = GLoRAModule("theirs", layer, **options).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    return layer, theirs, sample().double()


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, 5.0)])
def test_same_output_and_same_weight(name: str, rank: int, alpha: float) -> None:
    layer, theirs, x = pair(name, lora_dim=rank, alpha=alpha)
    model = nn.Sequential(layer)
    patch = adapters.inject(model, LycorisGLoRA(rank, float(theirs.alpha)))
    tensors = {key.removesuffix(".weight"): t for key, t in theirs.state_dict().items() if key != "alpha"}
    patch.load_state_dict({f"0.{key}": tensor for key, tensor in tensors.items()})
    merged, _ = theirs.get_merged_weight(shape=layer.weight.shape)
    torch.testing.assert_close(model[0].weight, merged, rtol=1e-10, atol=1e-10)
    weight, bias = merged.detach(), layer.bias
    expected = torch.func.functional_call(layer, {"weight": weight, **({} if bias is None else {"bias": bias})}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    patch.eject()
    theirs.apply_to()
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


def test_theirs_is_for_no_convolution_in_groups() -> None:
    """LyCORIS makes tensors for all input channels, where the weight has those of one group, and fails as it runs."""
    layer = nn.Conv2d(4, 6, 3, groups=2)
    theirs = GLoRAModule("theirs", layer, lora_dim=2)
    with pytest.raises(RuntimeError):
        theirs.get_merged_weight()
    model = nn.Sequential(layer)
    adapters.inject(model, LycorisGLoRA(2))
    assert torch.equal(model(torch.ones(1, 4, 5, 5)), layer(torch.ones(1, 4, 5, 5)))
