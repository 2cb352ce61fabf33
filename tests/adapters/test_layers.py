"""Every kind of layer: adapted, merged, mixed by rows, differentiated, and left as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm
from transformers.pytorch_utils import Conv1D

import adapters
from adapters import LoRA, TargetError
from tests.adapters.models import perturb, snapshot


class Doubling(nn.Linear):
    """A Linear whose forward is its own."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias) * 2


class Scaled(nn.Embedding):
    """An embedding that multiplies, as some language models have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 8


class Experts(nn.Module):
    """Stacked weights, as mixtures of experts have them: tokens of all rows in one batch, two experts for each."""

    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Parameter(torch.randn(3, 5, 4))
        self.down_proj = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor, chosen: Tensor) -> Tensor:
        hidden = torch.einsum("ni,noi->no", x, self.up_proj[chosen]).relu()
        return torch.einsum("ni,noi->no", hidden, self.down_proj[chosen])


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = Experts()

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        return self.experts(tokens, tokens.sum(-1).abs().long() % 3).view_as(x)


class Reads(nn.Module):
    """A model that reads the weight of its layer itself, and ties it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.embed(x), self.embed.weight)


class Attends(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first = options.pop("first", True)
        self.masked = options.pop("masked", False)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=self.first, **options)

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.first else x.transpose(0, 1)
        key = x[..., : self.attention.kdim]
        ignored = torch.zeros(4, 3, dtype=torch.bool)
        ignored[1, 2] = True
        mask = torch.zeros(8, 3, 3, dtype=x.dtype)
        mask[2, 0, 1] = -3.0
        output, scores = self.attention(
            x, key, x, key_padding_mask=ignored if self.masked else None, attn_mask=mask if self.masked else None
        )
        output = output if self.first else output.transpose(0, 1)
        return torch.cat([output, scores], dim=-1)


def wrapped(layer: nn.Module) -> nn.Module:
    return nn.Sequential(layer)


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, dtype=torch.float64)


def integers(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, 7, shape)


def encoder(**options: Any) -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True, **options)


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Any]] = {
    "linear": (lambda: wrapped(nn.Linear(4, 5)), floats(4, 3, 4), None),
    "linear without bias": (lambda: wrapped(nn.Linear(4, 5, bias=False)), floats(4, 4), None),
    "linear subclass": (lambda: wrapped(Doubling(4, 5)), floats(4, 4), None),
    "conv1d": (lambda: wrapped(nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2)), floats(4, 4, 7), None),
    "conv2d": (
        lambda: wrapped(nn.Conv2d(3, 5, (3, 2), dilation=2, padding_mode="circular", padding=1)),
        floats(4, 3, 6, 7),
        None,
    ),
    "conv2d same": (lambda: wrapped(nn.Conv2d(3, 5, 3, padding="same")), floats(4, 3, 5, 5), None),
    "depthwise conv2d": (lambda: wrapped(nn.Conv2d(4, 8, 3, groups=4)), floats(4, 4, 5, 5), None),
    "conv3d": (lambda: wrapped(nn.Conv3d(2, 4, 2, stride=(1, 2, 1))), floats(4, 2, 3, 4, 3), None),
    "transposed conv1d": (lambda: wrapped(nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2)), floats(4, 4, 5), None),
    "transposed conv2d": (
        lambda: wrapped(nn.ConvTranspose2d(4, 6, (3, 2), stride=2, padding=1, output_padding=(1, 0), groups=2)),
        floats(4, 4, 3, 4),
        None,
    ),
    "transposed conv3d": (lambda: wrapped(nn.ConvTranspose3d(2, 3, 2, dilation=2)), floats(4, 2, 3, 2, 2), None),
    "embedding": (lambda: wrapped(nn.Embedding(7, 4)), integers(4, 3), None),
    "embedding with padding": (lambda: wrapped(nn.Embedding(7, 4, padding_idx=2)), integers(4, 3), None),
    "embedding with max_norm": (lambda: wrapped(nn.Embedding(7, 4, max_norm=1.0)), integers(4, 3), None),
    "scaled embedding": (lambda: wrapped(Scaled(7, 4)), integers(4, 3), None),
    "transformers conv1d": (lambda: wrapped(Conv1D(5, 4)), floats(4, 3, 4), None),
    "weight norm": (lambda: wrapped(parametrizations.weight_norm(nn.Linear(4, 5))), floats(4, 4), None),
    "old weight norm": (lambda: wrapped(weight_norm(nn.Conv1d(4, 5, 2))), floats(4, 4, 3), None),
    "orthogonal": (lambda: wrapped(parametrizations.orthogonal(nn.Linear(4, 4))), floats(4, 4), None),
    "attention": (Attends, floats(4, 3, 4), None),
    "attention by name": (Attends, floats(4, 3, 4), "attention"),
    "attention, sequence first": (lambda: Attends(first=False), floats(4, 3, 4), None),
    "attention with masks": (lambda: Attends(masked=True), floats(4, 3, 4), None),
    "attention, own key size": (lambda: Attends(kdim=2, bias=False), floats(4, 3, 4), None),
    "bare parameter": (Attends, floats(4, 3, 4), "in_proj_weight"),
    "experts": (Mixture, floats(4, 3, 4), ["up_proj", "down_proj"]),
    "weight read by the model": (Reads, integers(4, 3), None),
    "encoder layer": (encoder, floats(4, 3, 4), None),
    "encoder layer, norm first": (lambda: encoder(norm_first=True), floats(4, 3, 4), "linear1"),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[str, nn.Module, Tensor, Any]:
    torch.default_generator.manual_seed(0)
    make, sample, targets = KINDS[request.param]
    model, x = make().double().eval(), sample()
    with torch.no_grad():
        model(x)  # An embedding with max_norm shortens its own rows when it first reads them.
    return request.param, model, x, targets


def test_adapted_merged_mixed_and_ejected(kind: tuple[str, nn.Module, Tensor, Any]) -> None:
    name, model, x, targets = kind
    before = snapshot(model)
    with torch.no_grad():
        whole = model(x)
        flags = [parameter.requires_grad_(False) for parameter in model.parameters() if parameter.requires_grad]
        base = model(x)  # Torch's attention rounds otherwise for parameters that need no gradient.
        for parameter in flags:
            parameter.requires_grad_(True)
        patches = [adapters.inject(model, LoRA(rank=2, alpha=3), targets, name=letter) for letter in "ab"]
        for patch in patches:
            # As they start, they change nothing.
            torch.testing.assert_close(model(x), base, rtol=1e-10, atol=1e-10)
            for parameter in patch.parameters():
                parameter.zero_()
        perturb(patches[0], seed=1)
        perturb(patches[1], seed=2)
        outputs = {}
        for choice in ((), ("a",), ("b",), ("a", "b")):
            with adapters.use(model, *choice):
                outputs[choice] = model(x)
                model.train()
                assert torch.allclose(model(x), base) == (not choice)
                model.eval()
        assert torch.equal(outputs[()], base)
        assert not torch.allclose(outputs["a",], outputs["b",])
        # Merged in either order they compute the same.
        for order in (patches, patches[::-1]):
            for patch in order:
                patch.merge()
                torch.testing.assert_close(model(x), outputs["a", "b"], rtol=1e-10, atol=1e-10)
            for choice, output in outputs.items():
                with adapters.use(model, *choice):
                    torch.testing.assert_close(model(x), output, rtol=1e-10, atol=1e-10)
            for patch in order:
                patch.unmerge()
            assert torch.equal(model(x), outputs["a", "b"])
        # Each row is what it is in a batch that has the same for all.
        with adapters.use(model, rows=["b", None, ("a", "b"), "b"]):
            if name == "weight read by the model":
                with pytest.raises(adapters.AdapterError, match="read by its weight"):
                    model(x)
            else:
                rows = [outputs["b",][0], base[1], outputs["a", "b"][2], outputs["b",][3]]
                torch.testing.assert_close(model(x), torch.stack(rows), rtol=1e-10, atol=1e-10)
        for patch in patches:
            patch.eject()
        assert snapshot(model) == before
        assert torch.equal(model(x), whole)


def test_single_precision(kind: tuple[str, nn.Module, Tensor, Any]) -> None:
    _, model, x, targets = kind
    model, x = model.float(), x.float() if x.is_floating_point() else x
    patch = adapters.inject(model, LoRA(rank=2, alpha=3), targets)
    perturb(patch)
    with torch.no_grad():
        expected = model(x)
        patch.merge()
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_finite_differences(kind: tuple[str, nn.Module, Tensor, Any]) -> None:
    name, model, x, targets = kind
    patch = adapters.inject(model, LoRA(rank=1, alpha=3), targets)
    perturb(patch)
    parameters = list(patch.parameters())
    inputs = [x.requires_grad_()] if x.is_floating_point() and "experts" not in name else []

    def run(*_: Tensor) -> Tensor:
        return model(x)

    if "max_norm" in name:  # Torch lets no gradient through the shortening of rows: it is that of plain lookup.
        factor = torch.randn_like(model(x))
        found = torch.autograd.grad((model(x) * factor).sum(), parameters)
        (branch,) = model[0].branches
        looked_up = nn.functional.embedding(x, branch.change({"weight": model[0].base_weight("weight")}, 1.0)["weight"])
        expected = torch.autograd.grad((looked_up * factor).sum(), parameters)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
        return
    if "padding" in name:  # What pads gets no gradient, by agreement.
        x[x == 2] = 3
    assert torch.autograd.gradcheck(run, (*inputs, *parameters))


@pytest.mark.parametrize("layer", [nn.LSTM(3, 4), nn.GRU(3, 4), nn.LSTMCell(3, 4), nn.Bilinear(2, 2, 2), nn.PReLU()])
def test_layers_that_cannot_be_adapted_are_refused(layer: nn.Module) -> None:
    model = nn.ModuleDict({"layer": layer, "linear": nn.Linear(2, 2)})
    before = snapshot(model)
    recurrent = isinstance(layer, nn.RNNBase | nn.RNNCellBase)
    for target in ["layer", *(name for name, _ in model.named_parameters() if recurrent and "layer." in name)]:
        with pytest.raises(TargetError, match=f"is a {type(layer).__name__}, which LoRA cannot adapt"):
            adapters.inject(model, LoRA(rank=1), target)
    assert snapshot(model) == before
    assert list(adapters.inject(model, LoRA(rank=1)).targets) == ["linear"]


@pytest.mark.parametrize(
    "name", ["transposed conv1d", "attention by name", "linear subclass", "weight norm", "experts"]
)
def test_dropout_is_refused_where_it_would_do_nothing(name: str) -> None:
    make, _, targets = KINDS[name]
    model = make()
    before = snapshot(model)
    with pytest.raises(TargetError, match="adapted through its weight, where no input can be dropped"):
        adapters.inject(model, LoRA(rank=1, dropout=0.1), targets)
    assert snapshot(model) == before


def test_a_computed_weight_can_be_merged_but_not_folded_in() -> None:
    model, x = nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 5))), torch.randn(2, 4)
    patch = adapters.inject(model, LoRA(rank=2))
    perturb(patch)
    expected = model(x)
    with pytest.raises(adapters.PatchStateError, match="remove its parametrization"):
        patch.merge_and_eject()
    patch.merge()
    torch.testing.assert_close(model(x), expected)
