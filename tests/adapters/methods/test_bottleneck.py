"""Bottleneck adapters compute their formula, after or beside layers and whole blocks, in every kind of model."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import adapters
import fluxion as fl
from adapters import AdapterError, Bottleneck, TargetError
from tests.adapters.models import perturb, snapshot
from tests.adapters.pretrained import build

FUNCTIONS = {"gelu": F.gelu, "relu": torch.relu, "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh}

numbers = st.builds(
    Bottleneck,
    size=st.none() | st.integers(1, 5),
    reduction=st.integers(1, 4),
    activation=st.sampled_from(sorted(FUNCTIONS)),
    parallel=st.booleans(),
    scaling=st.sampled_from([1.0, 4.0, -0.5]),
    norm=st.booleans(),
)


def expected(method: Bottleneck, state: dict[str, Tensor], base: Tensor, source: Tensor) -> Tensor:
    """The formula on features in the last dimension."""
    if method.norm:
        mean = source.mean(-1, keepdim=True)
        variance = (source - mean).square().mean(-1, keepdim=True)
        source = (source - mean) / (variance + 1e-5).sqrt() * state["norm.weight"] + state["norm.bias"]
    down, up = (state[f"{name}.weight"].flatten(1) for name in ("down", "up"))
    middle = FUNCTIONS[method.activation](source @ down.T + state["down.bias"])
    return base + method.scaling * (middle @ up.T + state["up.bias"])


def tensors(patch: adapters.Patch, path: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{path}."): t for name, t in patch.state_dict().items() if name.startswith(f"{path}.")}


@settings(max_examples=30)
@given(method=numbers, inputs=st.integers(1, 6), outputs=st.integers(1, 6))
def test_linear(method: Bottleneck, inputs: int, outputs: int) -> None:
    torch.default_generator.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(inputs, outputs)).double(), torch.randn(2, 3, inputs, dtype=torch.float64)
    base = model(x)
    patch = adapters.inject(model, method, "0")
    assert torch.equal(model(x), base)
    perturb(patch)
    state = tensors(patch, "0")
    assert state["down.weight"].shape[0] == (method.size or max(1, outputs // method.reduction))
    torch.testing.assert_close(model(x), expected(method, state, base, x if method.parallel else base))
    patch.scale = 0.25
    full = expected(method, state, base, x if method.parallel else base)
    torch.testing.assert_close(model(x), base.lerp(full, 0.25))


@settings(max_examples=15)
@given(
    method=st.builds(Bottleneck, size=st.integers(1, 4), activation=st.sampled_from(sorted(FUNCTIONS))),
    dims=st.integers(1, 3),
    stride=st.integers(1, 2),
    transposed=st.booleans(),
)
def test_convolution(method: Bottleneck, dims: int, stride: int, transposed: bool) -> None:
    torch.default_generator.manual_seed(0)
    kind = getattr(nn, f"Conv{'Transpose' * transposed}{dims}d")
    model = nn.Sequential(kind(4, 6, 3, stride=stride, groups=2)).double()
    x = torch.randn(2, 4, *[5] * dims, dtype=torch.float64)
    base = model(x)
    patch = adapters.inject(model, method, "0")
    assert torch.equal(model(x), base)
    perturb(patch)
    last = base.movedim(1, -1)
    torch.testing.assert_close(model(x).movedim(1, -1), expected(method, tensors(patch, "0"), last, last))


def test_embedding() -> None:
    model, x = nn.Sequential(nn.Embedding(7, 4)).double(), torch.tensor([[1, 2], [6, 1]])
    base, method = model(x), Bottleneck(size=3, norm=True)
    patch = adapters.inject(model, method, "0")
    perturb(patch)
    torch.testing.assert_close(model(x), expected(method, tensors(patch, "0"), base, base))


class Block(nn.Module):
    """A block that takes its input by name and gives several things."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(4, 6), nn.Linear(6, 4), kind

    def forward(self, *, flag: bool, hidden: Tensor, other: Tensor) -> Any:
        output = self.second(self.first(hidden).relu())
        if self.kind == "tensor":
            return output
        return (output, other, None) if self.kind == "tuple" else {"nothing": None, "output": output, "other": other}


class Blocks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.block = Block(kind)

    def forward(self, x: Tensor) -> Any:
        return self.block(flag=True, hidden=x, other=x + 1)


@pytest.mark.parametrize("kind", ["tensor", "tuple", "mapping"])
@pytest.mark.parametrize("parallel", [False, True])
def test_blocks_are_adapted_in_the_first_thing_they_give(kind: str, parallel: bool) -> None:
    model, x = Blocks(kind).double(), torch.randn(3, 2, 4, dtype=torch.float64)
    before, whole = snapshot(model), model(x)

    def first(output: Any) -> Tensor:
        return output if kind == "tensor" else output[0] if kind == "tuple" else output["output"]

    method = Bottleneck(size=3, parallel=parallel)
    patch = adapters.inject(model, method, "block")
    perturb(patch)
    base = first(whole)
    full = expected(method, tensors(patch, "block"), base, x if parallel else base)
    output = model(x)
    torch.testing.assert_close(first(output), full)
    if kind != "tensor":
        assert type(output) is type(whole) and len(output) == 3
        torch.testing.assert_close(output["other"] if kind == "mapping" else output[1], x + 1)
    with adapters.use(model, rows=["default", None, {"default": 0.5}]):
        mixed = first(model(x))
    torch.testing.assert_close(mixed, torch.stack([full[0], base[1], base[2].lerp(full[2], 0.5)]))
    patch.eject()
    assert snapshot(model) == before


# The last layers of the blocks, and the blocks themselves where these end there.
PLACES: dict[str, tuple[list[str], list[str] | None]] = {
    "bert": (["attention.output.dense", "output.dense"], None),
    "llama": (["o_proj", "down_proj"], ["self_attn", "mlp"]),
    "gpt2": (["attn.c_proj", "mlp.c_proj"], ["attn", "mlp"]),
    "t5": (["SelfAttention.o", "wo"], ["SelfAttention", "DenseReluDense"]),
}


@pytest.mark.parametrize("name", PLACES)
def test_language_models(name: str) -> None:
    case = build(name)
    lasts, blocks = PLACES[name]
    case.model.double()
    before, base = snapshot(case.model), case()
    patch = adapters.inject(case.model, Bottleneck(size=3), lasts, seed=1)
    assert torch.equal(case(), base)
    perturb(patch)
    after_layers = case()
    assert not torch.allclose(after_layers, base, rtol=1e-3, atol=1e-3)
    with adapters.use(case.model, rows=["default", None, "default", None]):
        torch.testing.assert_close(case(), torch.stack([after_layers[0], base[1], after_layers[2], base[3]]))
    state = list(patch.state_dict().values())
    patch.eject()
    assert snapshot(case.model) == before
    if blocks is None:
        return
    # After the last layer of a block is after the block.
    patch = adapters.inject(case.model, Bottleneck(size=3), blocks)
    patch.load_state_dict(dict(zip(patch.state_dict(), state, strict=True)))
    torch.testing.assert_close(case(), after_layers)
    patch.eject()
    # And parallel adapters, of each block together with another on the layer inside of it.
    patch = adapters.inject(case.model, Bottleneck(size=3, parallel=True, scaling=4.0), blocks)
    assert torch.equal(case(), base)
    perturb(patch)
    inner = adapters.inject(case.model, adapters.LoRA(rank=1), lasts, name="inner")
    perturb(inner, 2)
    both = case()
    inner.merge()
    torch.testing.assert_close(case(), both)
    for one in (patch, inner):
        one.eject()
    assert snapshot(case.model) == before


def test_where_pfeiffer_puts_them() -> None:
    model = build("bert").model
    patch = adapters.inject(model, Bottleneck(), "**.layer.*.output.dense", exclude="attention.output.dense")
    assert sorted(patch.targets) == [f"bert.encoder.layer.{number}.output.dense" for number in range(2)]


@pytest.mark.parametrize("targets", ["linear2", "self_attn", ["self_attn", "linear2"]])
def test_torch_steps_aside_with_its_fused_kernel(targets: Any) -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)).eval()
    x = torch.randn(2, 3, 8)
    before, base = snapshot(model), model(x)
    patch = adapters.inject(model, Bottleneck(size=3), targets)
    perturb(patch, std=1.0)
    with torch.no_grad():
        output = model(x)
        assert not torch.allclose(output, base, rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(output, model.train()(x))  # In training, that kernel is not used.
    model.eval()
    patch.eject()
    assert snapshot(model) == before


def test_chains() -> None:
    model = fl.Chain(fl.Chain(fl.Linear(4, 6), fl.ReLU(), fl.Linear(6, 4)), fl.Linear(4, 2))
    x = torch.randn(3, 4)
    before, base, method = snapshot(model), model(x), Bottleneck(size=3, parallel=True)
    patch = adapters.inject(model, method, "Chain")
    assert torch.equal(model(x), base)
    perturb(patch)
    hidden = expected(method, tensors(patch, "Chain"), model[0].base(x), x)
    torch.testing.assert_close(model(x), model[1](hidden))
    assert "(BOTTLENECK) default(size=3" in repr(model) and "Linear(in_features=4, out_features=3" in repr(model)
    patch.eject()
    assert snapshot(model) == before


def test_blocks_without_layers_need_their_features() -> None:
    case = build("mixtral")
    base = case()
    with pytest.raises(TargetError, match="which Bottleneck cannot adapt"):
        adapters.inject(case.model, Bottleneck(), "mlp")
    patch = adapters.inject(case.model, Bottleneck(features=16), "mlp")
    perturb(patch)
    assert not torch.allclose(case(), base)


@pytest.mark.parametrize("parallel", [False, True])
def test_features_that_are_not_those_of_the_block_are_refused(parallel: bool) -> None:
    case = build("qwen_moe")
    adapters.inject(case.model, Bottleneck(parallel=parallel), "mlp")  # The last layer in it is a gate.
    with pytest.raises(TargetError, match="gives 16 features, not 1: say how many with features="):
        case()


def test_a_layer_that_is_read_by_its_weight_is_refused() -> None:
    model = nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True))
    with pytest.raises(TargetError, match="which Bottleneck cannot adapt"):
        adapters.inject(model, Bottleneck(), "out_proj")


def test_a_block_with_a_cache_cannot_mix_rows() -> None:
    case = build("llama")
    adapters.inject(case.model, Bottleneck(), "self_attn")
    with (
        adapters.use(case.model, rows=["default", None, None, None]),
        pytest.raises(adapters.RowsError, match="cannot split a DynamicCache into rows"),
    ):
        case.model(case.inputs, use_cache=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "a size of 1 or more, not 0"),
        ({"reduction": 0}, "a reduction of 1 or more, not 0"),
        ({"reduction": None}, "a reduction of 1 or more, not None"),
        ({"features": 1.5}, "a features of 1 or more"),
        ({"activation": "cube"}, "an activation out of gelu, relu"),
    ],
)
def test_numbers_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)):
        Bottleneck(**options)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (nn.Conv2d(4, 4, 3), {"parallel": True}, "0 takes other positions or features than it gives"),
        (nn.Embedding(4, 4), {"parallel": True}, "0 takes other positions or features than it gives"),
        (nn.Conv1d(4, 4, 3), {"norm": True}, "0 gives channels, which norm=True does not normalise"),
        (nn.LSTM(4, 4), {}, "0 is a LSTM, which Bottleneck cannot adapt"),
        (nn.ModuleList([nn.Linear(2, 2)]), {}, "0 is a ModuleList, which Bottleneck cannot adapt"),
        (nn.ReLU(), {}, "0 is a ReLU, which Bottleneck cannot adapt"),
    ],
)
def test_layers_that_it_does_not_fit(layer: nn.Module, options: dict[str, Any], message: str) -> None:
    model = nn.Sequential(layer)
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        adapters.inject(model, Bottleneck(**options), "0")
    assert snapshot(model) == before


def test_targets_have_to_be_named() -> None:
    with pytest.raises(TargetError, match="name them with targets="):
        adapters.inject(nn.Sequential(nn.Linear(2, 2)), Bottleneck())
