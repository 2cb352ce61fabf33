"""Libraries: what is used is there and right, what is in the model fits the budget, and nothing is left at the end."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import sys
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from torch import Tensor, nn

import adapters
import weights
from adapters import (
    AdapterError,
    BudgetError,
    DoRA,
    LayerMismatchError,
    Library,
    LoRA,
    PatchNameError,
    PatchStateError,
)
from adapters.runtime import adapted_layer as adapted
from tests.adapters.models import build, perturb, snapshot

MODEL = "plain"


@dataclass
class Shelf:
    """Adapters in files, their sizes in memory, and what the model computes with each: by name."""

    sources: dict[str, Path]
    sizes: dict[str, int]
    outputs: dict[str, Tensor]
    base: Tensor


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    torch.set_num_threads(1)
    folder, case = tmp_path_factory.mktemp("shelf"), build(MODEL)
    shelf = Shelf({}, {}, {}, case())
    for number in range(16):
        name, rank = f"a{number}", 1 + number % 3
        method = DoRA(rank=rank) if number % 4 == 3 else LoRA(rank=rank)
        patch = adapters.inject(case.model, method, "block.**" if number % 5 == 4 else None, name=name)
        perturb(patch, seed=number)
        shelf.sources[name] = patch.save_pretrained(folder / name)
        shelf.sizes[name] = bytes_in(case.model)
        shelf.outputs[name] = case()
        patch.eject()
    assert len({tuple(output.flatten().tolist()) for output in shelf.outputs.values()}) == 16
    return shelf


def bytes_in(model: nn.Module) -> int:
    """The bytes of all tensors of the patches that are in a model."""
    return sum(t.nbytes for patch in adapters.patches(model).values() for t in patch.state_dict().values())


@contextlib.contextmanager
def frequent_switches() -> Iterator[None]:
    """In this block, threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def run_threads(work: Callable[[int], None], count: int) -> None:
    """Run a function in some threads at once, and raise what one of them has raised."""
    errors: list[BaseException] = []

    def guarded(number: int) -> None:
        torch.set_num_threads(1)  # A new thread has a number of its own, and products of matrices round by it.
        try:
            work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(number,)) for number in range(count)]
    with frequent_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


class Paging(RuleBasedStateMachine):
    """A library of six adapters, more or fewer, and a table in the order of use of what should be in the model."""

    shelf: Shelf
    names = tuple(f"a{number}" for number in range(6))

    @initialize(fits=st.integers(1, 4))
    def start(self, fits: int) -> None:
        self.case = build(MODEL)
        self.before = snapshot(self.case.model)
        self.budget = sum(sorted(self.shelf.sizes[name] for name in self.names)[-fits:])
        known = self.names[:5]
        self.library = Library(self.case.model, {name: self.shelf.sources[name] for name in known}, budget=self.budget)
        self.known, self.here = set(known), OrderedDict[str, int]()
        self.blocks: list[tuple[list[str], contextlib.AbstractContextManager[None]]] = []
        self.own: adapters.Patch | None = None

    def pinned(self) -> set[str]:
        return {name for names, _ in self.blocks for name in names}

    def predicted(self, names: list[str]) -> OrderedDict[str, int] | None:
        """What is in the model after some are used, or None where they do not fit."""
        here = self.here.copy()
        for name in names:
            here.setdefault(name, self.shelf.sizes[name])
            here.move_to_end(name)
        for name in self.here:
            if sum(here.values()) > self.budget and name not in self.pinned() | {*names}:
                del here[name]
        return here if sum(here.values()) <= self.budget else None

    def enter(self, names: list[str], block: contextlib.AbstractContextManager[None]) -> bool:
        """Enter a block that uses some adapters, and check that it is refused where it has to be."""
        expected = self.predicted(names)
        if not self.known.issuperset(names):
            with pytest.raises(PatchNameError):
                block.__enter__()
        elif expected is None:
            with pytest.raises(BudgetError, match="raise budget"):
                block.__enter__()
        else:
            block.__enter__()
            self.here = expected
            self.blocks.append((names, block))
            return True
        return False

    @rule(name=st.sampled_from(names), stay=st.booleans())
    def use(self, name: str, stay: bool) -> None:
        if self.enter([name], self.library.use(name)):
            assert torch.equal(self.case(), self.shelf.outputs[name])
            if not stay:
                self.leave()

    @rule(chosen=st.lists(st.sampled_from(names), min_size=2, max_size=3, unique=True))
    def use_several(self, chosen: list[str]) -> None:
        if self.enter(chosen, self.library.use(dict.fromkeys(chosen, 0.5))):
            output = self.case()
            with adapters.use(self.case.model, *({name: 0.5} for name in chosen)):
                assert torch.equal(self.case(), output)

    @rule(rows=st.lists(st.sampled_from([*names, None]), min_size=4, max_size=4))
    def use_rows(self, rows: list[str | None]) -> None:
        if self.enter([*dict.fromkeys(name for name in rows if name)], self.library.use(rows=rows)):
            expected = [self.shelf.outputs[name] if name else self.shelf.base for name in rows]
            torch.testing.assert_close(self.case(), torch.stack([out[row] for row, out in enumerate(expected)]))

    @rule()
    def use_none(self) -> None:
        if self.enter([], self.library.use()):
            assert torch.equal(self.case(), self.shelf.base)

    @rule()
    def leave(self) -> None:
        if self.blocks:
            self.blocks.pop()[1].__exit__(None, None, None)

    @rule(name=st.sampled_from(names))
    def add(self, name: str) -> None:
        if name in self.known:
            with pytest.raises(PatchNameError, match="already"):
                self.library.add(name, self.shelf.sources[name])
        else:
            self.library.add(name, self.shelf.sources[name])
            self.known.add(name)

    @rule(name=st.sampled_from(names))
    def remove(self, name: str) -> None:
        if name not in self.known:
            with pytest.raises(PatchNameError):
                self.library.remove(name)
        elif name in self.pinned():
            with pytest.raises(PatchStateError, match="in use"):
                self.library.remove(name)
        else:
            self.library.remove(name)
            self.known.remove(name)
            self.here.pop(name, None)

    @rule()
    def use_a_broken_file(self) -> None:
        self.library.add("broken", self.shelf.sources["a0"] / "README.md")
        with pytest.raises(weights.WeightsError), self.library.use("broken"):
            pass
        self.library.remove("broken")

    @rule()
    def change_another_patch(self) -> None:
        if self.own is None:
            self.own = adapters.inject(self.case.model, LoRA(rank=2), name="own")
            perturb(self.own)
        else:
            self.own.eject()
            self.own = None

    @invariant()
    def as_predicted(self) -> None:
        assert self.library.resident == tuple(self.here)
        assert self.library.nbytes == sum(self.here.values()) <= self.budget
        assert {*self.library} == self.known and len(self.library) == len(self.known)
        assert adapters.patches(self.case.model).keys() - {"own"} == self.here.keys()
        if not self.blocks and self.own is None:  # Outside of all blocks, none of them acts.
            assert torch.equal(self.case(), self.shelf.base)

    def teardown(self) -> None:
        if self.blocks and self.pinned():
            with pytest.raises(PatchStateError, match="in use"):
                self.library.close()
            self.as_predicted()
        while self.blocks:
            self.leave()
        self.library.close()
        self.library.close()
        if self.own is not None:
            self.own.eject()
        assert snapshot(self.case.model) == self.before
        with pytest.raises(PatchStateError, match="closed"), self.library.use():
            pass


def test_any_sequence_of_uses_is_that_of_a_table_in_the_order_of_use(shelf: Shelf) -> None:
    Paging.shelf = shelf
    phases = (Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink)
    run_state_machine_as_test(Paging, settings=settings(max_examples=40, stateful_step_count=25, phases=phases))


@pytest.mark.parametrize("name", [MODEL, "chain"])
def test_patches_come_and_go_while_other_threads_run_the_model(name: str) -> None:
    case = build(name)
    before, base = snapshot(case.model), case()
    done = threading.Event()

    def work(number: int) -> None:
        if number > 1:
            while not done.is_set():
                with adapters.use(case.model):
                    assert torch.equal(case(), base)
            return
        try:
            for step in range(40):
                names = [f"{number}{key}{step}" for key in "abc"]
                patches = [adapters.inject(case.model, LoRA(rank=1), name=name) for name in names]  # They do nothing.
                assert [name for name in adapters.patches(case.model) if name.startswith(str(number))] == names
                for patch in random.sample(patches, 3):
                    patch.eject()
        finally:
            done.set()

    run_threads(work, 4)
    assert adapters.patches(case.model) == {}
    assert snapshot(case.model) == before


def test_what_reads_a_node_is_not_disturbed_by_branches_that_come_and_go() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    first = adapters.inject(model, LoRA(rank=1), name="first")
    before = iter(model[0])
    assert next(before) is model[0].base
    second = adapters.inject(model, LoRA(rank=1), name="second")
    between = iter(model[0])
    assert next(between) is model[0].base
    second.eject()
    branches = [patch.attachments[0].branch for patch in (first, second)]
    assert [*before] == branches[:1] and [*between] == branches and model[0].branches == branches[:1]


def test_threads_get_their_own_answers_while_adapters_come_and_go(shelf: Shelf) -> None:
    case = build(MODEL)
    before = snapshot(case.model)
    budget = 8 * max(shelf.sizes.values())  # Just enough for eight threads, out of sixteen adapters.
    with Library(case.model, shelf.sources, budget=budget) as library:

        def work(number: int) -> None:
            choose = random.Random(number)
            for _ in range(40):
                name = choose.choice([*shelf.sources])
                with library.use(name):
                    for _ in range(2):
                        assert torch.equal(case(), shelf.outputs[name])
                    assert name in library.resident
                    assert bytes_in(case.model) <= budget
                if choose.random() < 0.2:
                    with library.use():
                        assert torch.equal(case(), shelf.base)

        run_threads(work, 8)
        assert 0 < library.nbytes == bytes_in(case.model) <= budget
    assert snapshot(case.model) == before


def test_threads_with_rows_of_their_own(shelf: Shelf) -> None:
    case = build(MODEL)
    with Library(case.model, shelf.sources, budget=9 * max(shelf.sizes.values())) as library:

        def work(number: int) -> None:
            choose = random.Random(number)
            for _ in range(15):
                rows = [choose.choice([*shelf.sources, None]) for _ in range(2)] * 2
                expected = [shelf.outputs.get(name or "", shelf.base)[row] for row, name in enumerate(rows)]
                with library.use(rows=rows):
                    torch.testing.assert_close(case(), torch.stack(expected))

        run_threads(work, 4)


def test_tasks_get_their_own_answers(shelf: Shelf) -> None:
    case = build(MODEL)
    sizes = sorted(shelf.sizes.values(), reverse=True)
    library = Library(case.model, shelf.sources, budget=sum(sizes[:6]))

    async def work(number: int) -> None:
        choose = random.Random(number)
        for _ in range(10):
            name = choose.choice([*shelf.sources])
            with library.use(name):
                await asyncio.sleep(0)
                assert torch.equal(case(), shelf.outputs[name])
                await asyncio.sleep(0)
                assert torch.equal(case(), shelf.outputs[name])

    async def together() -> None:
        await asyncio.gather(*(work(number) for number in range(6)))

    asyncio.run(together())
    assert len(library.resident) >= 6


def test_what_leaves_is_freed_at_once(shelf: Shelf) -> None:
    case = build(MODEL)
    gc.collect()
    gc.disable()
    try:
        with Library(case.model, shelf.sources, budget=1) as library:
            for name in shelf.sources:
                library.budget = shelf.sizes[name]
                with library.use(name):
                    case()
                    held = [weakref.ref(tensor) for tensor in adapters.patches(case.model)[name].parameters()]
                other = "a1" if name != "a1" else "a0"
                library.budget = shelf.sizes[other]
                with library.use(other):
                    assert not any(ref() is not None for ref in held), name
    finally:
        gc.enable()


def test_what_is_in_use_stays_whenever_it_was_used(shelf: Shelf) -> None:
    case = build(MODEL)
    library = Library(case.model, shelf.sources, budget=shelf.sizes["a0"] + 2 * shelf.sizes["a2"])
    with library.use("a0"):
        for name in ("a2", "a5", "a8"):  # All of one size.
            with library.use(name):
                assert torch.equal(case(), shelf.outputs[name])
        assert library.resident == ("a0", "a5", "a8")
        assert torch.equal(case(), shelf.outputs["a0"])
    with library.use("a2"):
        assert library.resident == ("a8", "a2")


def test_files_are_read_when_they_are_used(shelf: Shelf, tmp_path: Path) -> None:
    case = build(MODEL)
    library = Library(case.model, {"later": tmp_path / "later"}, budget=10_000)
    with pytest.raises(weights.SourceNotFoundError), library.use("later"):
        pass
    assert library.resident == () and adapters.patches(case.model) == {}
    (tmp_path / "later").symlink_to(shelf.sources["a3"])
    with library.use("later"):
        assert torch.equal(case(), shelf.outputs["a3"])
    library.remove("later")
    library.add("later", weights.read_adapter(shelf.sources["a5"]))
    with library.use("later"):
        assert torch.equal(case(), shelf.outputs["a5"])


def test_a_load_that_fails_changes_nothing(shelf: Shelf) -> None:
    case, other = build(MODEL), build("chain")
    misfit = adapters.inject(other.model, LoRA(rank=1)).adapter_file()
    budget = shelf.sizes["a0"] + shelf.sizes["a2"]
    library = Library(case.model, {**shelf.sources, "misfit": misfit}, budget=budget)
    for name in ("a0", "a2"):
        with library.use(name):
            pass
    before, resident = snapshot(case.model), library.resident
    for names, error, message in (
        (["a5", "misfit"], LayerMismatchError, "there is no layer"),
        (
            ["a0", "a2", "a5"],
            BudgetError,
            r"A budget of [\d,]+ bytes is too small for the [\d,]+ of 'a5', 'a0', 'a2': raise",
        ),
        (["a1", "a55"], PatchNameError, "Neither the library nor the model has an adapter 'a55': did you mean 'a5'?"),
        ([{"a1": float("nan")}], AdapterError, "finite"),
    ):
        with pytest.raises(error, match=message), library.use(*names):
            pass
        assert library.resident == resident and snapshot(case.model) == before
    with library.use("a2"), pytest.raises(BudgetError, match=r"Adapters in use leave .* of 'a5': raise budget"):
        library.use("a5").__enter__()
    assert library.resident == resident and snapshot(case.model) == before
    library.budget = 1
    with pytest.raises(BudgetError, match=f"A budget of 1 bytes is too small for the {shelf.sizes['a5']:,} of 'a5'"):
        library.use("a5").__enter__()
    assert library.resident == resident and snapshot(case.model) == before


def test_an_exchange_that_fails_halfway_is_undone(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the layers were replaced meanwhile."""
    case = build(MODEL)
    library = Library(case.model, shelf.sources, budget=max(shelf.sizes.values()))
    with library.use("a0"):
        pass
    steps, case.model.steps = case.model.steps, nn.ModuleList()
    with pytest.raises(LayerMismatchError), library.use("a1"):
        pass
    case.model.steps = steps
    inject = adapters.Patch.inject

    def failing(patch: adapters.Patch) -> adapters.Patch:
        if patch.name == "a2":
            raise PatchStateError("No.")
        return inject(patch)

    monkeypatch.setattr(adapters.Patch, "inject", failing)
    with pytest.raises(PatchStateError, match="No"), library.use("a2"):
        pass
    assert library.resident == (*adapters.patches(case.model),) == ("a0",)
    assert library.nbytes == shelf.sizes["a0"]
    with library.use("a0"):
        assert torch.equal(case(), shelf.outputs["a0"])


def test_other_patches_can_be_used_beside(shelf: Shelf) -> None:
    case = build(MODEL)
    own = adapters.inject(case.model, LoRA(rank=2), name="own")
    perturb(own, seed=99)
    alone = case()
    with pytest.raises(PatchNameError, match="The model has a patch 'own' already"):
        Library(case.model, {"own": shelf.sources["a0"]}, budget=10_000)
    with Library(case.model, shelf.sources, budget=max(shelf.sizes.values())) as library:
        with library.use("a0"):
            assert torch.equal(case(), shelf.outputs["a0"])
            with library.use("own"):
                assert torch.equal(case(), alone)
            with library.use("a0", "own"):
                both = case()
                assert not torch.equal(both, alone) and not torch.equal(both, shelf.outputs["a0"])
        assert torch.equal(case(), alone)
    assert adapters.patches(case.model) == {"own": own}
    assert torch.equal(case(), alone)


def test_a_patch_that_was_ejected_by_hand_comes_again(shelf: Shelf) -> None:
    case = build(MODEL)
    before = snapshot(case.model)
    with Library(case.model, shelf.sources, budget=10_000) as library:
        for _ in range(2):
            with library.use("a0"):
                assert torch.equal(case(), shelf.outputs["a0"])
            patch = adapters.patches(case.model)["a0"]
            patch.eject()
    assert snapshot(case.model) == before


def test_a_patch_that_left_cannot_be_injected(shelf: Shelf) -> None:
    case = build(MODEL)
    with Library(case.model, shelf.sources, budget=10_000) as library, library.use("a0"):
        patch = adapters.patches(case.model)["a0"]
    with pytest.raises(PatchStateError, match="load it again"):
        patch.inject()


def test_a_patch_that_left_says_so(shelf: Shelf, tmp_path: Path) -> None:
    case = build(MODEL)
    with Library(case.model, shelf.sources, budget=10_000) as library, library.use("a0"):
        patch = adapters.patches(case.model)["a0"]
    assert not patch.injected and not patch.merged
    assert repr(patch) == "<Patch 'a0', evicted: its tensors are freed>"
    assert str(patch).splitlines() == ["Patch 'a0': evicted, scale 1, disabled", "  evicted: its tensors are freed"]
    assert "evicted" in patch._repr_html_()
    calls: list[Callable[[], object]] = [
        *(patch.inject, patch.eject, patch.merge, patch.unmerge, patch.merge_and_eject, patch.adapter_file),
        *(lambda: patch.load_state_dict({}), lambda: patch.save_pretrained(tmp_path / "out")),
    ]
    for call in calls:
        with pytest.raises(PatchStateError, match=r"The patch 'a0' was evicted, .* load it again"):
            call()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("budget", [0, -1, 1.5, None])
def test_a_budget_is_a_number_of_bytes(budget: object) -> None:
    with pytest.raises(AdapterError, match="budget= has to be a positive number of bytes"):
        Library(nn.Sequential(nn.Linear(2, 2)), budget=budget)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", 3])
def test_an_adapter_needs_a_name(name: object) -> None:
    with pytest.raises(PatchNameError, match="needs a name"):
        Library(nn.Sequential(nn.Linear(2, 2)), {name: "somewhere"}, budget=1)  # type: ignore[dict-item]


def test_models_of_a_pipeline_share_a_library(tmp_path: Path) -> None:
    parts = {"unet": nn.Sequential(nn.Linear(4, 4)), "text_encoder": nn.Sequential(nn.Linear(4, 4))}
    both = adapters.inject(parts, LoRA(rank=2), name="both")
    perturb(both)
    x = torch.randn(2, 4)
    expected = [part(x) for part in parts.values()]
    both.save_pretrained(tmp_path / "both.safetensors", format="fluxion")
    both.eject()
    with Library(parts, {"both": tmp_path / "both.safetensors"}, budget=1_000) as library:
        with library.use("both"):
            assert all(torch.equal(part(x), output) for part, output in zip(parts.values(), expected, strict=True))
        library.remove("both")
        library.add("both", tmp_path / "both.safetensors", component="unet", strict=False)
        assert "both" in library and "1 adapters, 0 in the model" in repr(library)
    assert not any(isinstance(module, adapters.AdaptedLayer) for part in parts.values() for module in part.modules())


def test_a_call_keeps_no_branch_that_leaves_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """It keeps what it has found a node to be made of."""
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    stays, *leaving = (adapters.inject(model, LoRA(rank=1), name=name) for name in ("stays", "leaves"))
    tensors = [weakref.ref(tensor) for tensor in leaving[0].parameters()]
    find = adapted.FastPath

    def finding(node: adapters.AdaptedLayer, layer: nn.Module) -> adapted.FastPath:
        found = find(node, layer)
        leaving.pop().eject()
        return found

    monkeypatch.setattr(adapted, "FastPath", finding)
    with adapters.use(model, "stays"):
        model(x)
    monkeypatch.undo()
    gc.collect()
    assert not any(ref() is not None for ref in tensors)
    assert stays.injected
