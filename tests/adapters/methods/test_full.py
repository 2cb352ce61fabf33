"""`Full` is `W + s D` for a weight of any shape, and for its bias."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import adapters
from adapters import AdapterError, Full

LAYERS = {
    "linear": (lambda: nn.Linear(3, 4), lambda: torch.randn(2, 3), F.linear),
    "convolution": (
        lambda: nn.Conv2d(2, 4, (3, 2), groups=2),
        lambda: torch.randn(2, 2, 4, 4),
        lambda x, w, b: F.conv2d(x, w, b, groups=2),
    ),
    "normalisation": (lambda: nn.LayerNorm(4), lambda: torch.randn(2, 4), lambda x, w, b: F.layer_norm(x, (4,), w, b)),
}


@given(st.sampled_from(sorted(LAYERS)), st.booleans(), st.floats(-2, 2))
def test_closed_form(name: str, bias: bool, scale: float) -> None:
    make, sample, compute = LAYERS[name]
    model, x = nn.Sequential(make()).double(), sample().double()
    base = model(x)
    weight, own = model[0].weight, model[0].bias
    patch = adapters.inject(model, Full(bias=bias), scale=scale)
    assert torch.equal(model(x), base) and list(patch.targets) == ["0", "0.bias"][: 1 + bias]
    state = {name: torch.randn_like(value) for name, value in patch.state_dict().items()}
    patch.load_state_dict(state)
    changed = weight + scale * state["0.diff"]
    changed_bias = own + scale * state["0.bias.diff"] if bias else own
    torch.testing.assert_close(model(x), compute(x, changed, changed_bias), rtol=1e-12, atol=1e-12)


def test_two_of_them_add_up_and_can_be_combined() -> None:
    """An embedding too, whose weight is transposed as a matrix."""

    def run(model: nn.Module) -> Tensor:
        return model[1](model[0](torch.arange(4)).T)

    model = nn.Sequential(nn.Embedding(5, 6), nn.Conv1d(6, 3, 2)).double()
    for name in "ab":
        patch = adapters.inject(model, Full(), name=name)
        patch.load_state_dict({key: torch.randn_like(value) for key, value in patch.state_dict().items()})
    with adapters.use(model, {"a": 0.5, "b": -2.0}):
        expected = run(model)
    adapters.combine(model, {"a": 0.5, "b": -2.0}, name="both")
    with adapters.use(model, "both"):
        torch.testing.assert_close(run(model), expected, rtol=1e-12, atol=1e-12)


def test_what_is_no_matrix_cannot_be_combined() -> None:
    model = nn.Sequential(nn.LayerNorm(3))
    adapters.inject(model, Full())
    with pytest.raises(AdapterError, match="0 is not a 2-D weight, which a LoRA could change"):
        adapters.combine(model, {"default": 1.0})


def test_numbers_are_checked() -> None:
    with pytest.raises(AdapterError, match="Full needs a bias that is True or False, not 1"):
        Full(bias=1)  # type: ignore[arg-type]
