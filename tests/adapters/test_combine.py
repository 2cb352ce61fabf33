"""Patches combined: against the closed form of each technique, and as a patch like any other."""

from __future__ import annotations

import gc
import math
import weakref
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapters
from adapters import AdapterError, LoRA, Method, Patch, PatchNameError, PatchStateError, Tensors, WeightSpec
from adapters.methods.core.formulas import Additive
from tests.adapters.models import BUILDERS, build, perturb, snapshot
from tests.adapters.test_layers import KINDS
from tests.thinned import examples, one_in

PRUNINGS = ("magnitude", "ties", "dare")


class Zoo(nn.Module):
    """One weight of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.tall = nn.Linear(3, 9)
        self.conv = nn.Conv2d(4, 6, 3, groups=2)
        self.transposed = nn.ConvTranspose1d(4, 6, 3, groups=2)
        self.embedding = nn.Embedding(7, 5)
        self.transformers = Conv1D(5, 4)
        self.experts = nn.Parameter(torch.randn(3, 5, 4))
        self.bare = nn.Parameter(torch.randn(4, 8))


def zoo() -> nn.Module:
    """In a module of its own, since a model's own parameters are no targets."""
    return nn.ModuleDict({"zoo": Zoo()})


FULL_RANK = {
    "zoo.experts": 4,
    "zoo.bare": 4,
    "zoo.linear": 4,
    "zoo.tall": 3,
    "zoo.conv": 6,
    "zoo.transposed": 6,
    "zoo.embedding": 5,
    "zoo.transformers": 4,
}
PATHS = list(FULL_RANK)


def product(patch: Patch, path: str) -> Tensor:
    """`B A` from the tensors of a patch, in double precision."""
    state, layer = patch.state_dict(), patch.targets[path]
    down, up = (state[f"{path}.lora_{letter}.weight"].double() for letter in "AB")
    if isinstance(layer, nn.Embedding):
        return up @ down.T
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        down, up = down.flatten(1), up.flatten(1)
    return up @ down


@dataclass
class Source:
    """A patch to be combined, and what a test needs to know of it."""

    rank: int
    alpha: float
    rslora: bool
    weight: float
    paths: list[str] = field(default_factory=lambda: list(PATHS))

    def inject(self, model: nn.Module, name: str, seed: int) -> Patch:
        patch = adapters.inject(model, LoRA(self.rank, self.alpha, rslora=self.rslora), self.paths, name=name)
        perturb(patch, seed)
        self.patch = patch
        return patch

    def update(self, path: str) -> Tensor:
        root = math.sqrt(self.rank) if self.rslora else self.rank
        return self.weight * self.alpha / root * product(self.patch, path)


sources = st.lists(
    st.builds(
        Source,
        rank=st.integers(1, 5),
        alpha=st.floats(0.25, 32),
        rslora=st.booleans(),
        weight=st.floats(0.05, 2) | st.floats(-2, -0.05),
        paths=st.lists(st.sampled_from(PATHS), min_size=1, unique=True),
    ),
    min_size=1,
    max_size=3,
)


def injected(chosen: list[Source]) -> tuple[nn.Module, dict[str, float]]:
    """A model with these patches, in double precision, and the mapping that names them."""
    model = zoo().double()
    names = [f"source.{number}" for number in range(len(chosen))]
    for number, (name, source) in enumerate(zip(names, chosen, strict=True)):
        source.inject(model, name, seed=number)
    return model, {name: source.weight for name, source in zip(names, chosen, strict=True)}


def by_path(chosen: list[Source]) -> dict[str, list[Tensor]]:
    """The weighted updates for each path."""
    return {path: found for path in PATHS if (found := [s.update(path) for s in chosen if path in s.paths])}


def trim(update: Tensor, density: float) -> Tensor:
    kept = max(1, round(density * update.numel()))
    smallest = update.abs().flatten().sort(descending=True).values[kept - 1]
    return torch.where(update.abs() >= smallest, update, 0.0)


def ties(updates: list[Tensor], density: float) -> Tensor:
    """The paper's three steps, one entry at a time."""
    trimmed = [trim(update, density).flatten().tolist() for update in updates]
    entries = []
    for values in zip(*trimmed, strict=True):
        positive = sum(values) > 0
        agree = [value for value in values if value and (value > 0) == positive]
        entries.append(sum(agree) / len(agree) if agree else 0.0)
    return torch.tensor(entries, dtype=torch.float64).view_as(updates[0])


def check(combined: Patch, expected: dict[str, Tensor]) -> None:
    assert list(combined.targets) == list(expected) == list(combined.errors)
    for path, matrix in expected.items():
        torch.testing.assert_close(product(combined, path), matrix, rtol=1e-9, atol=1e-9)
        assert combined.errors[path] < 1e-12


def ranks(patch: Patch) -> dict[str, int]:
    content = patch.adapter_file().layers
    for layer in content.values():
        settings = dict(layer.hyperparameters)
        assert layer.method == "lora" and settings["alpha"] == settings["rank"] and not settings["rslora"]
    return {path: layer.hyperparameters["rank"] for path, layer in content.items()}


@examples(12, 30)
@given(sources)
def test_exact_is_the_weighted_sum(chosen: list[Source]) -> None:
    model, weights = injected(chosen)
    before = [source.patch.state_dict() for source in chosen]
    values = [{name: value.clone() for name, value in state.items()} for state in before]
    combined = adapters.combine(model, weights, name="both")
    check(combined, {path: sum(updates) for path, updates in by_path(chosen).items()})
    for path, rank in ranks(combined).items():
        assert rank == min(FULL_RANK[path], sum(source.rank for source in chosen if path in source.paths))
    assert list(adapters.patches(model).values()) == [*(source.patch for source in chosen), combined]
    for source, state, value in zip(chosen, before, values, strict=True):
        assert source.patch.scale == 1 and source.patch.enabled and not source.patch.merged
        assert all(parameter.requires_grad for parameter in source.patch.parameters())
        for name, tensor in source.patch.state_dict().items():
            assert tensor.data_ptr() == state[name].data_ptr() and torch.equal(tensor, value[name])


@examples(12, 30)
@given(sources, st.none() | st.integers(1, 7))
def test_svd_is_the_nearest_of_its_rank(chosen: list[Source], rank: int | None) -> None:
    model, weights = injected(chosen)
    combined = adapters.combine(model, weights, how="svd", rank=rank)
    for path, updates in by_path(chosen).items():
        matrix = sum(updates)
        u, singular, vt = torch.linalg.svd(matrix, full_matrices=False)
        needed = int((singular > 1e-12 * singular.amax(-1, keepdim=True)).sum(-1).max())
        kept = min(needed, rank or needed)
        assert ranks(combined)[path] == kept
        nearest = u[..., :kept] * singular[..., None, :kept] @ vt[..., :kept, :]
        torch.testing.assert_close(product(combined, path), nearest, rtol=1e-7, atol=1e-7)
        error = singular[..., kept:].norm() / singular.norm()
        assert combined.errors[path] == pytest.approx(error.item(), abs=1e-9)


@examples(12, 30)
@given(sources, st.sampled_from(["magnitude", "ties"]), st.floats(0.01, 1))
def test_pruning(chosen: list[Source], how: str, density: float) -> None:
    model, weights = injected(chosen)
    combined = adapters.combine(model, weights, how=how, density=density)
    expected = {
        path: ties(updates, density) if how == "ties" else sum(trim(update, density) for update in updates)
        for path, updates in by_path(chosen).items()
    }
    check(combined, expected)
    for path, rank in ranks(combined).items():
        assert 1 <= rank <= FULL_RANK[path]


@settings(max_examples=20)
@given(sources, st.floats(0.1, 1))
def test_dare_drops_and_rescales(chosen: list[Source], density: float) -> None:
    model, weights = injected(chosen)
    combined = adapters.combine(model, weights, how="dare", density=density, seed=0)
    for path, updates in by_path(chosen).items():
        # Each entry is the sum of some of what it was made of.
        sums = torch.zeros(1, *updates[0].shape, dtype=torch.float64)
        for update in updates:
            sums = torch.cat([sums, sums + update / density])
        distance = (sums - product(combined, path)).abs().amin(0)
        assert distance.max() < 1e-9 * max(1.0, sums.abs().max().item())


def test_dare_keeps_its_share_and_its_seed() -> None:
    model = nn.Sequential(nn.Linear(60, 50)).double()
    perturb(adapters.inject(model, LoRA(4), name="a"))
    state = torch.get_rng_state()
    options: dict[str, Any] = {"how": "dare", "density": 0.3}
    same, again, other = (
        adapters.combine(model, {"a": 1}, **options, name=str(number), seed=seed)
        for number, seed in enumerate((1, 1, 2))
    )
    assert torch.equal(torch.get_rng_state(), state)
    kept = product(same, "0").abs() > 1e-9
    assert kept.double().mean().item() == pytest.approx(0.3, abs=0.03)
    torch.testing.assert_close(product(same, "0")[kept], product(adapters.patches(model)["a"], "0")[kept] / 0.3)
    assert torch.equal(product(same, "0"), product(again, "0"))
    assert not torch.allclose(product(same, "0"), product(other, "0"))
    torch.default_generator.manual_seed(5)
    first = product(adapters.combine(model, {"a": 1}, **options, name="first"), "0")
    torch.default_generator.manual_seed(5)
    assert torch.equal(product(adapters.combine(model, {"a": 1}, **options, name="second"), "0"), first)


@pytest.mark.parametrize("how", PRUNINGS)
def test_a_rank_limits_what_was_pruned_and_the_error_says_by_how_much(how: str) -> None:
    model, weights = injected([Source(3, 4.0, False, 0.7), Source(2, 5.0, True, -0.3)])
    whole = adapters.combine(model, weights, how=how, density=0.5, seed=3, name="whole")
    part = adapters.combine(model, weights, how=how, density=0.5, seed=3, rank=2, name="part")
    assert set(ranks(part).values()) == {2} and max(ranks(whole).values()) > 2
    for path in PATHS:
        expected, got = product(whole, path), product(part, path)
        assert part.errors[path] == pytest.approx(((got - expected).norm() / expected.norm()).item(), abs=1e-9)
        assert part.errors[path] > 0.01


@pytest.mark.parametrize("name", KINDS)
def test_exact_computes_what_its_sources_do(name: str) -> None:
    torch.default_generator.manual_seed(0)
    make, sample, targets = KINDS[name]
    model, x = make().double().eval(), sample()
    with torch.no_grad():
        model(x)  # An embedding with max_norm shortens its own rows when it first reads them.
        before = snapshot(model)
        style = adapters.inject(model, LoRA(rank=2, alpha=3), targets, name="style", scale=0.1)
        pose = adapters.inject(model, LoRA(rank=1, alpha=5, rslora=True), targets, name="pose")
        perturb(style, 1)
        perturb(pose, 2)
        style.merge()  # Neither this nor that changes what they are.
        pose.enabled = False
        with adapters.use(model, {"style": 0.7, "pose": -0.3}):
            expected = model(x)
        both = adapters.combine(model, {"style": 0.7, "pose": -0.3}, name="both", scale=2.0)
        assert style.merged and not pose.enabled and style.scale == 0.1 and both.scale == 2.0
        with adapters.use(model, {"both": 1.0}):
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        style.eject()
        pose.eject()
        both.scale = 1.0
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        both.merge()
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        both.eject()
    assert snapshot(model) == before


def _some(path: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and len(path) % 2 == 0


@pytest.mark.parametrize(
    ("name", "how"),
    [("chain", how) for how in ("exact", "svd", *PRUNINGS)]
    + one_in(2, [(name, how) for how in ("exact", "svd") for name in BUILDERS if name != "chain"]),
)
def test_a_combined_patch_is_a_patch(name: str, how: str, tmp_path: Path) -> None:
    case = build(name)
    before, base = snapshot(case.model), case()
    style = adapters.inject(case.model, LoRA(rank=2, alpha=3), name="style")
    pose = adapters.inject(case.model, LoRA(rank=3), _some, name="pose")
    perturb(style, 1)
    perturb(pose, 2)
    density = 0.4 if how in PRUNINGS else None
    both = adapters.combine(case.model, {"style": 0.7, "pose": 0.3}, name="both", how=how, density=density, seed=1)
    with adapters.use(case.model, "both"):
        expected = case()
    assert not torch.allclose(expected, base)
    if how in ("exact", "svd"):
        with adapters.use(case.model, {"style": 0.7, "pose": 0.3}):
            torch.testing.assert_close(case(), expected, rtol=1e-4, atol=1e-5)
    style.eject()
    pose.eject()
    assert torch.equal(case(), expected)
    both.save_pretrained(tmp_path)
    other = build(name)
    loaded = adapters.load(other.model, tmp_path)
    assert torch.equal(other(), expected)
    assert ranks(loaded) == ranks(both)
    both.merge()
    torch.testing.assert_close(case(), expected, rtol=1e-4, atol=1e-5)
    both.unmerge()
    both.eject()
    both.inject()
    assert torch.equal(case(), expected)
    both.eject()
    assert snapshot(case.model) == before
    gone = [weakref.ref(patch) for patch in (style, pose, both)]
    del style, pose, both
    gc.collect()
    assert [patch() for patch in gone] == [None] * 3


def test_a_combined_patch_combines_again_and_trains() -> None:
    model, weights = injected([Source(1, 2.0, False, 0.5), Source(2, 1.0, True, 1.5)])
    first = adapters.combine(model, weights, name="first")
    second = adapters.combine(model, {"first": 2.0, "source.0": -1.0}, name="second")
    for path in PATHS:
        expected = 2 * product(first, path) - 2.0 * product(adapters.patches(model)["source.0"], path)
        torch.testing.assert_close(product(second, path), expected)
    parameters = [parameter.requires_grad_(True) for parameter in second.parameters()]
    assert not any(parameter.requires_grad for parameter in first.parameters())
    with adapters.use(model, "second"):
        model["zoo"].linear(torch.randn(2, 6, dtype=torch.float64)).sum().backward()
    assert sum(parameter.grad is not None for parameter in parameters) == 2


def test_the_base_stays_as_trainable_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[0].bias.requires_grad_(False)
    adapters.inject(model, LoRA(1), name="a", freeze_base=False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    both = adapters.combine(model, {"a": 1.0})
    assert [p.requires_grad for p in model.parameters() if p not in {*both.parameters()}] == flags


def test_a_stack_gets_the_rank_that_the_hardest_of_its_matrices_needs() -> None:
    model = zoo().double()
    dense = adapters.inject(model, Dense(), "experts", name="dense")
    with torch.no_grad():
        dense.state_dict()["zoo.experts.delta"][0, 2, 3] = 1.0
        dense.state_dict()["zoo.experts.delta"][1] = torch.randn(5, 3).double() @ torch.randn(3, 4).double()
    combined = adapters.combine(model, {"dense": 1.0}, how="svd")
    check(combined, {"zoo.experts": dense.state_dict()["zoo.experts.delta"]})
    assert ranks(combined) == {"zoo.experts": 3}


def test_low_rank_is_never_made_full(monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = injected([Source(1, 2.0, False, 0.5), Source(1, 1.0, True, 1.5)])

    def fail(*_: object) -> Tensor:
        raise RuntimeError("a full matrix")

    monkeypatch.setattr(LoRA, "change", fail)
    adapters.combine(model, weights, name="exact")
    adapters.combine(model, weights, name="svd", how="svd", rank=1)
    with pytest.raises(RuntimeError, match="a full matrix"):
        adapters.combine(model, weights, name="ties", how="ties", density=0.5)


def test_dtypes_meet_and_their_rounding_is_reported() -> None:
    model = nn.Sequential(nn.Linear(40, 30), nn.Linear(30, 40)).bfloat16()
    for name, target, dtype in (("half", None, None), ("single", "1", torch.float32)):
        perturb(adapters.inject(model, LoRA(4), target, name=name, dtype=dtype), seed=len(name))
    for how, rank in (("exact", None), ("svd", None), ("svd", 8)):
        both = adapters.combine(model, {"half": 0.7, "single": 0.3}, how=how, rank=rank)
        assert [parameter.dtype for parameter in both.parameters()] == [torch.bfloat16] * 2 + [torch.float32] * 2
        halved = 0.7 * product(adapters.patches(model)["half"], "0")
        error = (product(both, "0") - halved).norm() / halved.norm()
        assert 1e-4 < error < 1e-2
        assert both.errors["0"] == pytest.approx(error.item(), rel=1e-3)
        assert both.errors["1"] < 1e-6
        assert ranks(both) == {"0": 4, "1": 8}
        both.eject()


def test_what_changes_nothing_combines_to_nothing() -> None:
    model = zoo()
    adapters.inject(model, LoRA(2), PATHS, name="new")
    for how in ("exact", "svd", *PRUNINGS):
        both = adapters.combine(model, {"new": 1.0}, how=how, density=0.5 if how in PRUNINGS else None)
        assert all(not product(both, path).any() for path in PATHS)
        assert set(both.errors.values()) == {0.0}
        assert ranks(both) == dict.fromkeys(PATHS, 2 if how == "exact" else 1)
        both.eject()


@dataclass(frozen=True)
class Dense(Additive):
    """A whole matrix that is added, as tests of the general interface need it."""

    key = "dense"
    kinds = frozenset({"linear", "convolution", "embedding", "stack"})

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        return {"delta": site.zeros(*site.shape)}

    def delta(self, t: Tensors) -> Tensor:
        return t.delta


@dataclass(frozen=True)
class Stretching(Method):
    """Not an update, but a factor."""

    key = "stretching"

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        return {"delta": site.zeros()}

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return weight * (1 + t.delta)


@pytest.mark.parametrize("how", ["exact", "svd"])
def test_any_method_that_adds_can_be_combined(how: str) -> None:
    model = zoo().double()
    dense = adapters.inject(model, Dense(), PATHS, name="dense")
    lora = Source(1, 3.0, True, -2.0, PATHS[::2])
    perturb(dense, 3)
    lora.inject(model, "lora", 1)
    combined = adapters.combine(model, {"dense": 0.5, "lora": -2.0}, how=how)
    deltas = {path: 0.5 * dense.state_dict()[f"{path}.delta"] for path in PATHS}
    check(
        combined, {path: delta + lora.update(path) if path in lora.paths else delta for path, delta in deltas.items()}
    )
    assert ranks(combined) == FULL_RANK


@pytest.mark.parametrize(
    ("weights", "options", "error", "message"),
    [
        ({"style": 1.0, "posse": 1.0}, {}, PatchNameError, "no patch 'posse': did you mean 'pose'"),
        ({}, {}, AdapterError, "needs the names of patches and their weights"),
        (["style"], {}, AdapterError, "needs the names of patches and their weights"),
        ({"style": math.nan}, {}, AdapterError, "weight of 'style' has to be a finite number"),
        ({"style": "1"}, {}, AdapterError, "weight of 'style' has to be a finite number, not '1'"),
        ({"style": 1.0}, {"how": "svd", "rank": "2"}, AdapterError, "an integer of 1 or more, not '2'"),
        ({"style": 1.0}, {"how": "svd", "rank": 1.5}, AdapterError, "an integer of 1 or more, not 1.5"),
        ({"style": 1.0}, {"how": "ties", "density": "x"}, AdapterError, "at most 1, not 'x'"),
        ({"style": 1.0}, {"name": "pose"}, PatchNameError, "has a patch 'pose' already"),
        ({"style": 1.0}, {"name": ""}, PatchNameError, "a name"),
        ({"style": 1.0}, {"how": "linear"}, AdapterError, "choose from exact, svd, magnitude, ties, dare"),
        ({"style": 1.0}, {"rank": 4}, AdapterError, "leave rank= out"),
        ({"style": 1.0}, {"how": "svd", "rank": 0}, AdapterError, "1 or more, not 0"),
        ({"style": 1.0}, {"how": "svd", "density": 0.5}, AdapterError, "density= is for magnitude, ties, dare"),
        ({"style": 1.0}, {"how": "exact", "density": 0.5}, AdapterError, "keeps every entry"),
        ({"style": 1.0}, {"how": "ties"}, AdapterError, "needs density="),
        ({"style": 1.0}, {"how": "dare", "density": 0.0}, AdapterError, "more than 0 and at most 1, not 0.0"),
        ({"style": 1.0}, {"how": "magnitude", "density": 1.5}, AdapterError, "not 1.5"),
        ({"style": 1.0}, {"how": "magnitude", "density": math.nan}, AdapterError, "not nan"),
        ({"style": 1.0, "stretch": 1.0}, {}, AdapterError, "'stretch' cannot be combined: at zoo.linear, Stretch"),
        ({"style": 1.0, "broken": 1.0}, {}, AdapterError, "at zoo.conv is not finite"),
        ({"broken": 1.0}, {"how": "svd", "rank": 1}, AdapterError, "at zoo.conv is not finite"),
        ({"broken": 1.0}, {"how": "ties", "density": 0.5}, AdapterError, "at zoo.conv is not finite"),
    ],
)
def test_bad_input_changes_nothing(weights: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = zoo()
    for name in ("style", "pose"):
        perturb(adapters.inject(model, LoRA(2), PATHS, name=name))
    adapters.inject(model, Stretching(), "linear", name="stretch")
    for parameter in adapters.inject(model, LoRA(1), "conv", name="broken").parameters():
        nn.init.constant_(parameter, math.inf)
    before, known = snapshot(model), adapters.patches(model)
    with pytest.raises(error, match=message):
        adapters.combine(model, weights, **options)
    assert snapshot(model) == before and adapters.patches(model) == known


def test_a_layer_that_is_gone_is_no_layer_left_out() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3)), nn.Linear(3, 3))
    adapters.inject(model, LoRA(1), name="a")
    with pytest.raises(PatchStateError, match="'a' has a layer that is not in this model"):
        adapters.combine(model[0], {"a": 1.0})
    assert list(adapters.patches(model)) == ["a"]
