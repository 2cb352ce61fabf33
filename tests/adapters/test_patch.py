"""Patches in and out of models: what they change, and that they leave no trace."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import adapters
import fluxion as fl
from adapters import AdapterError, LayerMismatchError, LoRA, PatchNameError, PatchStateError, TargetError
from tests.adapters.models import BUILDERS, Case, build, perturb, snapshot

LORA = LoRA(rank=2, alpha=4)


@pytest.fixture(params=BUILDERS)
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


def test_a_new_patch_changes_nothing_that_is_computed(case: Case) -> None:
    before = case()
    adapters.inject(case.model, LORA)
    assert torch.equal(case(), before)


def test_every_single_target_changes_the_output(case: Case) -> None:
    before = case()
    with torch.no_grad():
        patch = adapters.inject(case.model, LORA)
        paths = list(patch.targets)
        patch.eject()
        for path in paths:
            single = adapters.inject(case.model, LORA, targets=lambda candidate, _, path=path: candidate == path)
            perturb(single)
            for training in (False, True):
                case.model.train(training)
                torch.default_generator.manual_seed(0)
                adapted = case.run(case.model, case.inputs)
                with adapters.use(case.model):
                    torch.default_generator.manual_seed(0)
                    base = case.run(case.model, case.inputs)
                assert not torch.equal(adapted, base), (path, training)
            case.model.eval()
            single.eject()
    assert torch.equal(case(), before)


def test_ejected_model_is_what_it_was(case: Case) -> None:
    before, output = snapshot(case.model), case()
    first = adapters.inject(case.model, LORA, name="first")
    second = adapters.inject(case.model, LoRA(rank=1), name="second")
    perturb(first)
    perturb(second, seed=2)
    assert not torch.equal(case(), output)
    first.merge()
    first.eject()
    second.eject()
    assert snapshot(case.model) == before
    assert torch.equal(case(), output)


def test_nothing_keeps_an_ejected_patch_alive() -> None:
    case = build("bert")
    patch = adapters.inject(case.model, LORA)
    gone = [weakref.ref(patch), *map(weakref.ref, patch.parameters())]
    with adapters.use(case.model, "default"):
        case()
    patch.eject()
    del patch
    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)


def test_a_patch_does_not_keep_its_model_alive() -> None:
    case = build("chain")
    patch = adapters.inject(case.model, LORA)
    patch.eject()
    gone = weakref.ref(case.model)
    del case
    gc.collect()
    assert gone() is None
    with pytest.raises(PatchStateError, match="gone"):
        patch.inject()


def test_eject_and_inject_again(case: Case) -> None:
    before = snapshot(case.model)
    first, second = (adapters.inject(case.model, LORA, name=name) for name in ("first", "second"))
    perturb(first)
    perturb(second, seed=2)
    both = case()
    first.eject()
    assert not first.injected
    alone = case()
    assert not torch.equal(alone, both)
    first.inject()
    torch.testing.assert_close(case(), both)
    second.eject()
    first.eject()
    assert snapshot(case.model) == before


def test_scale_and_enabled(case: Case) -> None:
    base = case()
    patch = adapters.inject(case.model, LORA, scale=2.0)
    perturb(patch)
    full = case()
    patch.scale = 0.0
    assert torch.equal(case(), base)
    patch.scale = 2.0
    assert torch.equal(case(), full)
    patch.enabled = False
    assert torch.equal(case(), base)
    with adapters.use(case.model, "default"):
        assert torch.equal(case(), full)


def test_scale_zero_does_not_compute() -> None:
    case = build("plain")
    base = case()
    patch = adapters.inject(case.model, LORA, scale=0.0)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.fill_(float("inf"))
    assert torch.equal(case(), base)


def test_use_selects_weighs_and_nests(case: Case) -> None:
    base = case()
    first, second = (adapters.inject(case.model, LORA, name=name) for name in ("first", "second"))
    perturb(first)
    perturb(second, seed=2)
    both = case()
    first.enabled = second.enabled = False
    first.enabled = True
    alone = case()
    second.enabled = True
    first.scale, second.scale = 0.7, 0.3
    weighed = case()
    first.scale = second.scale = 1.0
    with adapters.use(case.model):
        assert torch.equal(case(), base)
        with adapters.use(case.model, "first"):
            assert torch.equal(case(), alone)
        assert torch.equal(case(), base)
    with adapters.use(case.model, {"first": 0.7, "second": 0.3}):
        assert torch.equal(case(), weighed)
    with adapters.use(case.model, "first", "second"):
        assert torch.equal(case(), both)
    assert torch.equal(case(), both)


def test_use_does_not_reach_other_models() -> None:
    one, other = build("plain"), build("plain", seed=5)
    for case in (one, other):
        perturb(adapters.inject(case.model, LORA))
    expected = other()
    with adapters.use(one.model):
        assert torch.equal(other(), expected)


def test_use_is_restored_after_an_error() -> None:
    case = build("plain")
    perturb(adapters.inject(case.model, LORA))
    expected = case()
    with pytest.raises(RuntimeError, match="inside"), adapters.use(case.model):
        raise RuntimeError("inside")
    assert torch.equal(case(), expected)


def test_each_row_of_a_batch_has_its_own_adapters(case: Case) -> None:
    for seed, name in enumerate(("first", "second")):
        perturb(adapters.inject(case.model, LORA, name=name), seed)
    singles = []
    for row, choice in enumerate(["first", None, {"first": 0.5, "second": 2.0}, "second"]):
        names = () if choice is None else (choice,)
        with adapters.use(case.model, *names):
            singles.append(case()[row])
    with adapters.use(case.model, rows=["first", None, {"first": 0.5, "second": 2.0}, "second"]):
        mixed = case()
    torch.testing.assert_close(mixed, torch.stack(singles))


def test_rows_must_fit_the_batch() -> None:
    case = build("plain")
    adapters.inject(case.model, LORA)
    with (
        adapters.use(case.model, rows=["default"] * 3),
        pytest.raises(AdapterError, match="3 entries for a batch of 4"),
    ):
        case()
    with pytest.raises(AdapterError, match="not both"), adapters.use(case.model, "default", rows=["default"]):
        pass


def test_threads_choose_for_themselves() -> None:
    case = build("bert")
    for seed in range(4):
        perturb(adapters.inject(case.model, LORA, name=f"p{seed}"), seed)
    expected = []
    for seed in range(4):
        with adapters.use(case.model, f"p{seed}"):
            expected.append(case())
    assert len({tuple(output.flatten().tolist()) for output in expected}) == 4
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(25):
            with adapters.use(case.model, f"p{number}"):
                if not torch.equal(case(), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_patches_are_listed_in_the_order_of_injection() -> None:
    case = build("chain")
    b = adapters.inject(case.model, LORA, name="b")
    a = adapters.inject(case.model, LORA, targets="Conv2d", name="a")
    assert list(adapters.patches(case.model).items()) == [("b", b), ("a", a)]
    assert set(a.targets) == {"Residual.Conv2d", "Conv2d"}
    b.eject()
    assert list(adapters.patches(case.model)) == ["a"]
    b.inject()
    assert list(adapters.patches(case.model)) == ["a", "b"]


def test_a_shared_layer_is_adapted_once_in_all_its_places() -> None:
    case = build("plain")
    patch = adapters.inject(case.model, LORA)
    assert case.model.steps[0] is case.model.alias
    assert isinstance(case.model.alias, adapters.AdaptedLayer)
    assert list(patch.targets) == ["stem", "block.0", "steps.0", "steps.1"]
    linear = fl.Linear(3, 3)
    chain = fl.Chain(linear, fl.ReLU(), linear)
    twice = adapters.inject(chain, LORA)
    perturb(twice)
    x = torch.randn(2, 3)
    inner = chain[0]
    assert chain[2] is inner
    assert torch.equal(chain(x), inner(torch.relu(inner(x))))
    twice.eject()
    assert chain[0] is linear
    assert chain[2] is linear


def test_copies_have_patches_of_their_own(case: Case) -> None:
    patch = adapters.inject(case.model, LORA)
    perturb(patch)
    adapted = case()
    for clone in (copy.deepcopy(case.model), pickle.loads(pickle.dumps(case.model))):
        other = Case(case.name, clone, case.inputs, case.run)
        assert torch.equal(other(), adapted)
        twin = adapters.patches(clone)["default"]
        assert twin is not patch
        assert twin.model is clone
        twin.enabled = False
        assert not torch.equal(other(), adapted)
        assert torch.equal(case(), adapted)
        twin.eject()
        assert not any(isinstance(module, adapters.AdaptedLayer) for module in clone.modules())
        twin.inject()
        twin.enabled = True
        assert torch.equal(other(), adapted)


@pytest.mark.parametrize("merged", [False, True])
def test_state_dict_keeps_every_base_key_and_loads_base_checkpoints(case: Case, merged: bool) -> None:
    base = {key: value.clone() for key, value in case.model.state_dict().items()}
    output = case()
    layers = (nn.Linear, nn.Conv2d)
    patch = adapters.inject(case.model, {lambda path, layer: isinstance(layer, layers): LoRA(rank=2, bias=True)})
    perturb(patch)
    unmerged = case()
    if merged:
        patch.merge()
    adapted = case()
    patched = case.model.state_dict()
    assert [key for key in patched if key in base] == list(base)
    assert len(patched) > len(base)
    with torch.no_grad():
        named = dict(case.model.named_parameters(remove_duplicate=False))
        if not merged:
            assert {key for key in named if key not in base} == {key for key in named if ".lora_default" in key}
        assert all(torch.equal(patched[key], value) for key, value in base.items())
        for key in base:
            patched[key].mul_(2)  # They are the model's own.
    case.model.load_state_dict(base)
    assert patch.merged == merged
    assert torch.equal(case(), adapted)

    bare = Case(case.name, build(case.name, seed=9).model, case.inputs, case.run)
    result = bare.model.load_state_dict(patched, strict=False)
    assert result.missing_keys == []
    assert set(result.unexpected_keys) == patched.keys() - base.keys()
    assert torch.equal(bare(), output)
    if merged:
        patch.unmerge()
    assert torch.equal(case(), unmerged)


def test_loading_a_state_dict_still_names_what_is_wrong() -> None:
    case = build("plain")
    adapters.inject(case.model, LORA)
    state = case.model.state_dict()
    del state["stem.weight"], state["stem.lora_default.lora_A.weight"]
    state["stem.other"] = torch.zeros(1)
    result = case.model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["stem.weight", "stem.lora_default.lora_A.weight"]
    assert result.unexpected_keys == ["stem.other"]
    state["steps.1.weight"] = torch.zeros(2, 2)
    with pytest.raises(RuntimeError, match=r"size mismatch for steps\.1\.weight"):
        case.model.load_state_dict(state, strict=False)


def test_adapted_layers_answer_for_their_layer() -> None:
    case = build("plain")
    stem, weight, bias = case.model.stem, case.model.stem.weight, case.model.stem.bias
    patch = adapters.inject(case.model, LORA)
    node = case.model.stem
    assert node.in_features == 6
    assert node.bias is bias
    with adapters.use(case.model):
        assert node.weight is weight
    perturb(patch)
    x = torch.randn(3, 6)
    torch.testing.assert_close(nn.functional.linear(x, node.weight, node.bias), node(x))
    with pytest.raises(AttributeError, match="nonsense"):
        node.nonsense  # noqa: B018
    patch.eject()
    assert case.model.stem is stem


def test_the_base_is_frozen_and_thawed_exactly() -> None:
    case = build("bert")
    frozen = next(case.model.parameters())
    frozen.requires_grad_(False)
    flags = [parameter.requires_grad for parameter in case.model.parameters()]
    first = adapters.inject(case.model, LORA, name="first")
    second = adapters.inject(case.model, LORA, name="second")
    trainable = {id(p) for p in case.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for patch in (first, second) for p in patch.parameters()}
    first.eject()
    assert not any(p.requires_grad for p in set(case.model.parameters()) - set(second.parameters()))
    second.eject()
    assert [parameter.requires_grad for parameter in case.model.parameters()] == flags

    free = adapters.inject(case.model, LORA, freeze_base=False)
    assert [p.requires_grad for p in case.model.parameters() if p not in set(free.parameters())] == flags


def test_weights_that_merged_ones_stand_in_for_are_frozen_too() -> None:
    case = build("chain")
    before = snapshot(case.model)
    first = adapters.inject(case.model, LORA, name="first", freeze_base=False)
    perturb(first)
    first.merge()
    second = adapters.inject(case.model, LORA, name="second")
    first.unmerge()
    adapted = {id(parameter) for patch in (first, second) for parameter in patch.parameters()}
    assert not any(p.requires_grad for p in case.model.parameters() if id(p) not in adapted)
    second.eject()
    first.eject()
    assert snapshot(case.model) == before


def test_training_moves_the_adapters_only(case: Case) -> None:
    before = {key: value.clone() for key, value in case.model.state_dict().items()}
    patch = adapters.inject(case.model, LORA)
    case.model.train()
    assert all(module.training for module in case.model.modules())
    optimizer = torch.optim.Adam(patch.parameters(), lr=0.01)
    with torch.no_grad():
        target = torch.randn_like(case.run(case.model, case.inputs))
    values = [parameter.clone() for parameter in patch.parameters()]
    for _ in range(2):  # B is zero at first, so A moves from the second step on.
        optimizer.zero_grad()
        nn.functional.mse_loss(case.run(case.model, case.inputs), target).backward()
        optimizer.step()
    named = zip(values, patch.named_parameters(), strict=True)
    assert [name for value, (name, parameter) in named if torch.equal(value, parameter)] == []
    patch.eject()
    after = case.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items() if "running" not in key)


def test_adapters_follow_the_mode_dtype_and_seed() -> None:
    case = build("plain")
    case.model.to(torch.bfloat16)
    patch = adapters.inject(case.model, LORA, seed=3)
    assert {p.dtype for p in patch.parameters()} == {torch.bfloat16}
    assert not any(module.training for module in case.model.modules())
    values = patch.state_dict()
    patch.eject()
    state = torch.get_rng_state()
    again = adapters.inject(case.model, LORA, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in values.items())
    again.eject()
    wide = adapters.inject(case.model, LORA, dtype=torch.float32)
    perturb(wide)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert case.run(case.model, case.inputs.bfloat16()).dtype == torch.bfloat16


def test_what_is_merged_goes_where_the_model_goes() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), weight_norm(nn.Linear(4, 3))).double()
    weight, x = model[0].weight, torch.randn(2, 4)
    patch = adapters.inject(model, LoRA(rank=2, bias=True))
    perturb(patch)
    expected = model(x.double()).float()
    patch.merge()
    model.float()
    torch.testing.assert_close(model(x), expected)
    patch.unmerge()
    torch.testing.assert_close(model(x), expected)
    patch.eject()
    assert model[0].weight is weight
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_parameter_groups_for_lora_plus() -> None:
    case = build("bert")
    patch = adapters.inject(case.model, LORA)
    slow, fast = patch.parameter_groups(lr=1e-3, ratio=8)
    named = dict(patch.named_parameters())
    assert {id(p) for p in fast["params"]} == {id(p) for name, p in named.items() if ".lora_B." in name}
    assert len(slow["params"]) + len(fast["params"]) == len(named)
    optimizer = torch.optim.AdamW([slow, fast])
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, 8e-3]


def test_hot_swap_of_the_weights() -> None:
    case = build("chain")
    patch = adapters.inject(case.model, LORA)
    perturb(patch)
    expected, saved = case(), {key: value.clone() for key, value in patch.state_dict().items()}
    perturb(patch, seed=7)
    patch.merge()
    assert not torch.allclose(case(), expected)
    patch.load_state_dict(saved)
    assert patch.merged
    torch.testing.assert_close(case(), expected, rtol=1e-5, atol=1e-6)
    saved["Conv2d.lora_A.weight"] = torch.zeros(1)
    saved["Conv2d.lora_C.weight"] = saved.pop("Conv2d.lora_B.weight")
    before = snapshot(case.model)
    with pytest.raises(adapters.LayerMismatchError, match=r"missing Conv2d\.lora_B.*unexpected Conv2d\.lora_C.*shape"):
        patch.load_state_dict(saved)
    assert snapshot(case.model) == before


def test_calls_that_do_not_fit_the_state_are_refused() -> None:
    case = build("chain")
    patch = adapters.inject(case.model, LORA)
    before = snapshot(case.model)
    for call, error in [
        (lambda: adapters.inject(case.model, LORA), PatchNameError),
        (lambda: adapters.inject(case.model, LORA, name=""), PatchNameError),
        (patch.inject, PatchStateError),
        (patch.unmerge, PatchStateError),
        (adapters.use(case.model, "defualt").__enter__, PatchNameError),
    ]:
        with pytest.raises(error):
            call()
        assert snapshot(case.model) == before
    patch.merge()
    with pytest.raises(PatchStateError, match="merged already"):
        patch.merge()
    patch.eject()
    for call in (patch.eject, patch.merge, patch.merge_and_eject):
        with pytest.raises(PatchStateError, match="not injected"):
            call()
    with pytest.raises(PatchNameError, match="did you mean 'style'"), adapters.use(build_named("style"), "styel"):
        pass


def build_named(name: str) -> nn.Module:
    case = build("chain")
    adapters.inject(case.model, LORA, name=name)
    return case.model


def test_a_patch_cannot_go_back_where_its_layers_are_gone() -> None:
    case = build("chain")
    patch = adapters.inject(case.model, LORA)
    patch.eject()
    case.model.replace(case.model.Linear_1, fl.Linear(90, 8))
    before = snapshot(case.model)
    with pytest.raises(PatchStateError, match="Linear_1 is"):
        patch.inject()
    assert snapshot(case.model) == before
    assert not patch.injected


@pytest.mark.parametrize("fails_at", [0, 1, 3])
def test_a_failing_injection_changes_nothing(fails_at: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("bert")
    before = snapshot(case.model)
    add_branch, calls = adapters.AdaptedLayer.add_branch, iter(range(100))

    def failing(self: adapters.AdaptedLayer, name: str, branch: Any) -> None:
        if next(calls) == fails_at:
            raise MemoryError("simulated")
        add_branch(self, name, branch)

    monkeypatch.setattr(adapters.AdaptedLayer, "add_branch", failing)
    with pytest.raises(MemoryError):
        adapters.inject(case.model, LORA)
    assert snapshot(case.model) == before
    assert adapters.patches(case.model) == {}


def test_printing() -> None:
    case = build("chain")
    patch = adapters.inject(case.model, LORA, targets="Linear_2", name="style")
    assert str(patch).splitlines() == [
        "Patch 'style': injected, scale 1",
        "  path      method                 parameters",
        "  Linear_2  LoRA(rank=2, alpha=4)          26",
        "  1 layers, 26 parameters",
    ]
    assert repr(case.model.Linear_2).splitlines() == [
        "(ADAPTED)",
        "    ├── Linear(in_features=8, out_features=5, device=cpu, dtype=float32)",
        "    └── (LORA) style(rank=2, alpha=4)",
        "        ├── Linear(in_features=8, out_features=2, device=cpu, dtype=float32) #1",
        "        ├── Multiply(scale=2.0)",
        "        └── Linear(in_features=2, out_features=5, device=cpu, dtype=float32) #2",
    ]


@pytest.mark.parametrize("scale", ["1", None, float("nan"), float("inf"), torch.tensor([1.0])])
def test_scales_are_finite_numbers(scale: object, tmp_path: Path) -> None:
    case = build("plain")
    before = snapshot(case.model)
    with pytest.raises(AdapterError, match="The scale of 'default' has to be a finite number, not"):
        adapters.inject(case.model, LoRA(rank=2), scale=scale)
    assert snapshot(case.model) == before
    patch = adapters.inject(case.model, LoRA(rank=2), scale=2)
    patch.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="The scale of 'default' has to be a finite number, not"):
        patch.scale = scale
    assert patch.scale == 2
    for choice in ({"default": scale}, {"rows": [{"default": scale}]}):
        with pytest.raises(AdapterError, match="The scale of 'default' has to be a finite number, not"):
            names, rows = ([], choice["rows"]) if "rows" in choice else ([choice], None)
            adapters.use(case.model, *names, rows=rows).__enter__()
    with pytest.raises(AdapterError, match="The scale of 'again' has to be a finite number, not"):
        adapters.load(case.model, tmp_path, name="again", scale=scale)
    assert list(adapters.patches(case.model)) == ["default"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype= has to be one of floating point, such as torch.float32, not 'float16'"),
        ({"dtype": torch.int8}, "dtype= has to be one of floating point"),
        ({"seed": "one"}, "seed= has to be an integer, not 'one'"),
        ({"name": 3}, "a string and not empty, not 3"),
        ({"name": ""}, "a string and not empty, not ''"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options: dict[str, Any], message: str) -> None:
    case = build("plain")
    before = snapshot(case.model)
    with pytest.raises(AdapterError, match=message):
        adapters.inject(case.model, LoRA(rank=2), **options)
    assert snapshot(case.model) == before


def test_weights_of_integers_need_a_dtype() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TargetError, match=r"0 has a weight of torch\.int8, no dtype to train in: pass dtype="):
        adapters.inject(model, LoRA(rank=2))
    patch = adapters.inject(model, LoRA(rank=2), dtype=torch.float32)
    assert {parameter.dtype for parameter in patch.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda patch: {"names": [patch]}, "A patch is chosen by its name, or by a mapping of names to scales"),
        (lambda patch: {"names": [1]}, "not by 1"),
        (lambda patch: {"rows": [patch, None]}, "A patch is chosen by its name"),
        (lambda patch: {"rows": "default"}, "a choice for each row of the batch, not 'default'"),
        (lambda patch: {"rows": []}, r"a choice for each row of the batch, not \[\]"),
    ],
)
def test_choices_of_the_wrong_kind_are_refused(choose: Callable[[Any], dict[str, Any]], message: str) -> None:
    case = build("plain")
    options = choose(adapters.inject(case.model, LoRA(rank=2)))
    with pytest.raises(AdapterError, match=message):
        adapters.use(case.model, *options.pop("names", []), **options).__enter__()


def test_what_does_not_fit_is_listed_in_order() -> None:
    case = build("plain")
    patch = adapters.inject(case.model, LoRA(rank=2), ["stem", "head"])
    names = list(patch.state_dict())
    with pytest.raises(LayerMismatchError) as caught:
        patch.load_state_dict({"b": torch.ones(1), "a": torch.ones(1)})
    expected = [*(f"missing {name}" for name in names), "unexpected b"]
    assert str(caught.value).partition(": ")[2] == "; ".join(expected) + "; and 1 more."


def partly_merged() -> tuple[Case, adapters.Patch]:
    """A patch that is merged at the second of its layers only."""
    case = build("plain")
    patch = adapters.inject(case.model, LORA)
    perturb(patch)
    attachment = patch.attachments[1]
    attachment.node.merge([(attachment.branch, 1.0)])
    return case, patch


def test_a_patch_that_is_merged_in_part_is_not_merged() -> None:
    _, patch = partly_merged()
    assert not patch.merged
    assert str(patch).startswith("Patch 'default': injected, merged in part, scale 1")
    patch.merge()
    assert patch.merged and all(attachment.merged for attachment in patch.attachments)
    with pytest.raises(PatchStateError, match="merged already"):
        patch.merge()


def test_a_patch_that_is_merged_in_part_can_be_unmerged() -> None:
    _, patch = partly_merged()
    patch.unmerge()
    assert not any(attachment.merged for attachment in patch.attachments)
    with pytest.raises(PatchStateError, match="is not merged"):
        patch.unmerge()


@pytest.mark.parametrize("leave", ["eject", "merge_and_eject"])
def test_a_patch_that_is_merged_in_part_leaves_as_any_other(leave: str) -> None:
    case, patch = partly_merged()
    expected = case() if leave == "merge_and_eject" else build("plain")()
    getattr(patch, leave)()
    torch.testing.assert_close(case(), expected)
    assert not any(isinstance(module, adapters.AdaptedLayer) for module in case.model.modules())


def test_new_values_are_merged_where_the_old_ones_were() -> None:
    case, patch = partly_merged()
    patch.scale = 0.5
    values = {name: torch.randn_like(tensor) for name, tensor in patch.state_dict().items()}
    patch.load_state_dict(values)
    assert [attachment.merged for attachment in patch.attachments] == [False, True, False, False]
    changed = case()
    patch.unmerge()
    torch.testing.assert_close(case(), changed)
    assert all(torch.equal(tensor, values[name]) for name, tensor in patch.state_dict().items())


@pytest.mark.parametrize("merged", [False, True])
def test_values_that_cannot_be_replaced_are_what_they_were(merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    case = build("plain")
    patch = adapters.inject(case.model, LORA)
    perturb(patch)
    if merged:
        patch.merge()
    before = {key: value.clone() for key, value in patch.state_dict().items()}
    outputs = case()
    calls = iter(range(100))

    def failing(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if next(calls) == 3:
            raise KeyboardInterrupt
        return tensor

    monkeypatch.setattr("adapters.patch.parameters.shard_like", failing)
    with pytest.raises(KeyboardInterrupt):
        patch.load_state_dict({key: torch.zeros_like(value) for key, value in before.items()})
    assert patch.merged == merged
    assert all(torch.equal(value, before[key]) for key, value in patch.state_dict().items())
    assert torch.equal(case(), outputs)


def test_the_notebook_view_is_escaped() -> None:
    model = nn.ModuleDict({"<img src=x>": nn.Linear(4, 4)})
    patch = adapters.inject(model, LORA, name="<b>&\x1b[31m\u202e")
    view = patch._repr_html_()
    assert view.startswith("<details") and view.endswith("</details>")
    assert "&lt;b&gt;&amp;" in view and "&lt;img src=x&gt;" in view
    assert "<b>" not in view and "<img" not in view and "\x1b" not in view and "\u202e" not in view


def test_the_notebook_view_of_many_layers_is_short() -> None:
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(300)))
    view = adapters.inject(model, LoRA(rank=1))._repr_html_()
    assert "... and 102 lines more" in view and len(view.splitlines()) < 210


@pytest.mark.parametrize(
    ("options", "mended"),
    [
        ({"target_modules": ["q", "v"]}, r"inject\(model, LoRA\(rank=2, alpha=4\), targets=\['q', 'v'\]\)"),
        ({"modules_to_save": ["head"]}, r"inject\(model, \{'head': Copy\(\), '\*\*': LoRA\(rank=2, alpha=4\)\}\)"),
        ({"exclude_modules": "stem"}, r"inject\(model, .*, exclude='stem'\)"),
        ({"adapter_name": "style"}, r"inject\(model, .*, name='style'\)"),
        ({"r": 8}, r"inject\(model, LoRA\(rank=8\)\)"),
        ({"lora_alpha": 8}, r"inject\(model, LoRA\(alpha=8\)\)"),
    ],
)
def test_habits_of_other_libraries_get_the_mended_call(options: dict[str, Any], mended: str) -> None:
    case = build("plain")
    before = snapshot(case.model)
    with pytest.raises(AdapterError, match=f"inject\\(\\) has no {next(iter(options))}=: write {mended} instead"):
        adapters.inject(case.model, LORA, **options)
    assert snapshot(case.model) == before


def test_the_mended_call_for_modules_to_save_runs() -> None:
    case = build("plain")
    patch = adapters.inject(case.model, {"head": adapters.Copy(), "**": LORA})
    assert {str(attachment.branch.method) for attachment in patch.attachments if "head" in attachment.path} == {
        "Copy()"
    }


def test_other_unknown_arguments_are_those_of_python() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        adapters.inject(build("plain").model, LORA, colour="red")
