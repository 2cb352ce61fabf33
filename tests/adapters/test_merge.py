"""Merging: the layers compute what layer and adapters computed together, and every bit comes back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
import fluxion as fl
from adapters import LoRA
from tests.adapters.models import BUILDERS, build, perturb, snapshot


@st.composite
def convolutions(draw: st.DrawFn) -> nn.Conv2d:
    groups = draw(st.sampled_from([1, 2, 3]))
    return nn.Conv2d(
        6,
        6 * draw(st.integers(1, 2)),
        (draw(st.integers(1, 3)), draw(st.integers(1, 4))),
        stride=(draw(st.integers(1, 3)), draw(st.integers(1, 2))),
        padding=(draw(st.integers(0, 3)), draw(st.integers(0, 2))),
        dilation=(draw(st.integers(1, 2)), draw(st.integers(1, 2))),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        dtype=torch.float64,
    )


@settings(max_examples=60)
@given(convolutions(), st.integers(1, 5), st.floats(0.1, 8), st.booleans(), st.sampled_from([1.0, 0.3, -2.0]))
def test_merged_convolutions_compute_the_same(
    layer: nn.Conv2d, rank: int, alpha: float, rslora: bool, scale: float
) -> None:
    model, x = nn.Sequential(layer), torch.randn(2, 6, 9, 10, dtype=torch.float64)
    patch = adapters.inject(model, LoRA(rank, alpha, rslora=rslora), scale=scale)
    perturb(patch, std=1.0)
    with torch.no_grad():
        expected = model(x)
        patch.merge()
        assert not torch.equal(layer.weight, model[0].base_weight("weight"))
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        patch.unmerge()
        assert torch.equal(model(x), expected)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_merged_models_compute_the_same(name: str, dtype: torch.dtype, tolerance: float) -> None:
    case = build(name)
    case.model.to(dtype)
    if case.inputs.is_floating_point():
        case.inputs = case.inputs.to(dtype)
    base, before = case(), snapshot(case.model)
    first, second = (adapters.inject(case.model, LoRA(rank=3), name=name) for name in ("first", "second"))
    perturb(first, std=0.1)
    perturb(second, seed=2, std=0.1)
    expected = case()
    assert not torch.allclose(expected, base, rtol=1e-3)
    for order in itertools.permutations([first, second]):
        for patch in order:
            patch.merge()
            assert patch.merged
            torch.testing.assert_close(case(), expected, rtol=tolerance, atol=tolerance)
        for patch in order:
            patch.unmerge()
            torch.testing.assert_close(case(), expected, rtol=tolerance, atol=tolerance)
        assert torch.equal(case(), expected)
    first.eject()
    second.eject()
    assert snapshot(case.model) == before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_thousand_cycles_restore_every_bit(dtype: torch.dtype) -> None:
    model = fl.Chain(fl.Linear(16, 16, dtype=dtype), fl.Conv2d(1, 2, 3, dtype=dtype))
    own = list(model.parameters())
    bits = [parameter.detach().clone() for parameter in own]
    first, second = (adapters.inject(model, LoRA(rank=2), name=name) for name in ("first", "second"))
    perturb(first)
    perturb(second, seed=2)
    for cycle in range(1000):
        first.scale = 1 + cycle / 1000
        first.merge()
        if cycle % 3 == 0:
            second.merge()
        first.scale = -3.0
        if cycle % 5 == 0:
            perturb(first, seed=cycle)
        first.unmerge()
        if second.merged:
            second.unmerge()
    first.eject()
    second.eject()
    assert all(a is b for a, b in zip(model.parameters(), own, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(own, bits, strict=True))


def test_what_is_asked_for_is_computed_whatever_is_merged() -> None:
    case = build("bert")
    base = case()
    first, second = (adapters.inject(case.model, LoRA(rank=2), name=name) for name in ("first", "second"))
    perturb(first)
    perturb(second, seed=2)
    rows = ["first", None, "second", {"first": 0.5}]
    choices: list[tuple[object, ...]] = [("first",), ("second",), ("first", "second"), ({"first": 0.3},), ()]
    expected = []
    for choice in choices:
        with adapters.use(case.model, *choice):
            expected.append(case())
    with adapters.use(case.model, rows=rows):
        mixed = case()
    for merged in ([first], [second], [first, second]):
        for patch in merged:
            patch.merge()
        for choice, output in zip(choices, expected, strict=True):
            with adapters.use(case.model, *choice):
                torch.testing.assert_close(case(), output, rtol=1e-5, atol=1e-5)
        with adapters.use(case.model, rows=rows):
            torch.testing.assert_close(case(), mixed, rtol=1e-5, atol=1e-5)
        with adapters.use(case.model):
            assert torch.equal(case(), base)
        first.enabled = False
        torch.testing.assert_close(case(), expected[1], rtol=1e-5, atol=1e-5)
        first.enabled = True
        for patch in merged:
            patch.unmerge()


def test_scale_changes_of_a_merged_patch_are_followed() -> None:
    case = build("chain")
    patch = adapters.inject(case.model, LoRA(rank=2))
    perturb(patch)
    patch.scale = 0.25
    expected = case()
    patch.scale = 1.0
    patch.merge()
    patch.scale = 0.25
    torch.testing.assert_close(case(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", BUILDERS)
def test_merge_and_eject_leaves_a_plain_model(name: str) -> None:
    case = build(name)
    keys = list(case.model.state_dict())
    kinds = [type(module) for module in case.model.modules()]
    first, second = (adapters.inject(case.model, LoRA(rank=2), name=name) for name in ("first", "second"))
    perturb(first, std=0.1)
    perturb(second, seed=2, std=0.1)
    expected = case()
    second.merge()
    first.merge_and_eject()
    assert not first.injected
    torch.testing.assert_close(case(), expected, rtol=1e-4, atol=1e-5)
    second.merge_and_eject()
    torch.testing.assert_close(case(), expected, rtol=1e-4, atol=1e-5)
    assert list(case.model.state_dict()) == keys
    assert [type(module) for module in case.model.modules()] == kinds
    assert all(parameter.requires_grad for parameter in case.model.parameters())


def test_a_bias_that_is_folded_in_thaws_with_the_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    first, second = (adapters.inject(model, LoRA(rank=2, bias=True), name=name) for name in ("first", "second"))
    first.merge_and_eject()
    assert not any(parameter.requires_grad for parameter in model[0].base.parameters())
    second.eject()
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == {
        "0.weight": True,
        "0.bias": True,
    }


class Doubling(nn.Linear):
    """A Linear that does more with its weight than `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight / self.weight.norm(), self.bias) * 2


def test_a_subclass_with_a_forward_of_its_own() -> None:
    model, x = nn.Sequential(Doubling(5, 4, dtype=torch.float64)), torch.randn(3, 5, dtype=torch.float64)
    base = model(x)
    patch = adapters.inject(model, LoRA(rank=2))
    perturb(patch)
    expected = model(x)
    assert not torch.allclose(expected, base)
    expected.sum().backward()
    assert all(parameter.grad is not None for parameter in patch.parameters())
    patch.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    patch.eject()
    assert torch.equal(model(x), base)


@pytest.mark.parametrize("targets", [["0"], ["0", "1"], ["1"]])
def test_tied_weights_are_adapted_once_and_merged_once(targets: list[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4)).double()
    model[1].weight = model[0].weight
    tied = model[0].weight
    x = torch.randn(2, 4, dtype=torch.float64)
    before = snapshot(model)
    patch = adapters.inject(model, LoRA(rank=2), targets=targets)
    perturb(patch)
    assert list(patch.targets) == ["0", "1"]
    assert patch.num_parameters() == 2 * 2 * 4
    assert len(list(patch.parameters())) == len(set(patch.state_dict())) == 2
    state = patch.state_dict()
    weight = tied + state["0.lora_B.weight"] @ state["0.lora_A.weight"]
    expected = model[2](x @ weight.T @ weight.T)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    patch.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    patch.eject()
    assert snapshot(model) == before
    patch.inject()
    patch.merge_and_eject()
    assert model[1].weight is model[0].weight
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_a_tied_layer_can_be_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    patch = adapters.inject(model, LoRA(rank=2), exclude="1")
    perturb(patch)
    x = torch.randn(2, 4)
    expected = model(x)
    patch.merge()
    torch.testing.assert_close(model(x), expected)
    assert list(patch.targets) == ["0"]


@pytest.mark.parametrize("call", ["merge", "unmerge", "merge_and_eject"])
def test_a_failing_merge_changes_nothing(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("chain")
    patch, other = (adapters.inject(case.model, LoRA(rank=2), name=name) for name in ("first", "second"))
    perturb(patch)
    perturb(other, seed=2)
    other.merge()
    if call == "unmerge":
        patch.merge()
    before, merged = snapshot(case.model), patch.merged
    output = case()
    merged_copies, calls = adapters.AdaptedLayer.merged_copies, iter(range(100))

    def failing(*args: object) -> nn.Parameter:
        if next(calls) == 2:
            raise torch.OutOfMemoryError("simulated")
        return merged_copies(*args)

    monkeypatch.setattr(adapters.AdaptedLayer, "merged_copies", staticmethod(failing))
    with pytest.raises(torch.OutOfMemoryError):
        getattr(patch, call)()
    monkeypatch.undo()
    assert torch.equal(case(), output)
    assert patch.merged == merged
    assert patch.injected
    keys = [entry[:3] for entry in snapshot(case.model)[1:]]
    assert [key[0] for key in keys] == [entry[0] for entry in before[1:]]
    patch.eject()
    other.eject()
    assert not any(isinstance(module, adapters.AdaptedLayer) for module in case.model.modules())
