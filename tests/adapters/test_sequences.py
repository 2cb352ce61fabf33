"""Random sequences of calls, in every order: what is computed is right after each, and no trace is left at the end."""

from __future__ import annotations

import gc
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from torch import nn

import adapters
from adapters import AdapterError, LoRA, Patch
from tests.adapters.models import BUILDERS, build, perturb, snapshot
from tests.thinned import exhaustive

NAMES = ("a", "b", "c", "d.e")
SCALES = (0.0, 0.5, 1.0, -2.0)


def folded(name: str, active: list[tuple[Patch, float]]) -> torch.Tensor:
    """What a model computes whose weights are written by the formula, `W + scale * alpha / rank * B A`."""
    case = build(name)
    for patch, scale in active:
        state = patch.state_dict()
        alphas = {place.path: place.branch.method.alpha for place in patch.attachments}
        for path in patch.targets:
            down, up = (state[f"{path}.lora_{letter}.weight"].flatten(1) for letter in "AB")
            parameters = dict(case.model.named_parameters(remove_duplicate=False))
            weight = parameters[path] if path in parameters else parameters[f"{path}.weight"]
            if isinstance(patch.targets[path], nn.Embedding):
                update = scale * alphas[path] / down.shape[1] * down @ up.T
            else:
                update = scale * alphas[path] / len(down) * up @ down
            with torch.no_grad():
                weight += update.view_as(weight)
    return case()


class Sequences(RuleBasedStateMachine):
    """One model, patches of four names that are injected, ejected or in files, and a mirror of what they should do."""

    name = "chain"

    @initialize()
    def start(self) -> None:
        self.case = build(self.name)
        self.before = snapshot(self.case.model)
        self.base = self.case()
        self.order: list[Patch] = []  # Injected, in the order of injection.
        self.out: list[Patch] = []  # Ejected.
        self.folder = tempfile.TemporaryDirectory()
        self.seed = 0

    def pick(self, data: st.DataObject, among: list[Patch] | None = None) -> Patch:
        # By number, since what is drawn is kept alive.
        among = self.order if among is None else among
        return among[data.draw(st.integers(0, len(among) - 1))]

    @rule(
        data=st.data(),
        name=st.sampled_from(NAMES),
        rank=st.integers(1, 3),
        scale=st.sampled_from(SCALES),
        freeze=st.booleans(),
    )
    def inject(self, data: st.DataObject, name: str, rank: int, scale: float, freeze: bool) -> None:
        paths = data.draw(st.sampled_from([None, nn.Linear, lambda path, _: len(path) % 2 == 0]))
        try:
            patch = adapters.inject(
                self.case.model, LoRA(rank, 3.0), targets=paths, name=name, scale=scale, freeze_base=freeze
            )
        except AdapterError:
            assert name in adapters.patches(self.case.model)
            return
        self.seed += 1
        perturb(patch, self.seed, std=0.1)
        self.order.append(patch)

    @precondition(lambda self: self.order)
    @rule(data=st.data(), name=st.sampled_from(NAMES), trainable=st.booleans())
    def save_and_load(self, data: st.DataObject, name: str, trainable: bool) -> None:
        self.seed += 1
        path = self.pick(data).save_pretrained(Path(self.folder.name) / str(self.seed))
        if name in adapters.patches(self.case.model):
            with pytest.raises(AdapterError):
                adapters.load(self.case.model, path, name=name, trainable=trainable)
        else:
            self.order.append(adapters.load(self.case.model, path, name=name, trainable=trainable))

    @precondition(lambda self: self.order)
    @rule(data=st.data(), name=st.sampled_from(NAMES), how=st.sampled_from(["exact", "svd"]))
    def combine(self, data: st.DataObject, name: str, how: str) -> None:
        weights = {self.pick(data).name: 0.7, self.pick(data).name: -0.5}
        if name in adapters.patches(self.case.model):
            with pytest.raises(AdapterError):
                adapters.combine(self.case.model, weights, name=name, how=how)
            return
        with adapters.use(self.case.model, weights):
            expected = self.case()
        self.order.append(adapters.combine(self.case.model, weights, name=name, how=how))
        with adapters.use(self.case.model, name):
            torch.testing.assert_close(self.case(), expected, rtol=1e-4, atol=1e-4)

    @precondition(lambda self: self.order)
    @rule(data=st.data(), scale=st.sampled_from(SCALES), enabled=st.booleans())
    def toggle(self, data: st.DataObject, scale: float, enabled: bool) -> None:
        patch = self.pick(data)
        patch.scale, patch.enabled = scale, enabled

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def merge_or_unmerge(self, data: st.DataObject) -> None:
        patch = self.pick(data)
        if patch.merged:
            with pytest.raises(AdapterError):
                patch.merge()
            patch.unmerge()
        else:
            with pytest.raises(AdapterError):
                patch.unmerge()
            patch.merge()

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def swap_weights(self, data: st.DataObject) -> None:
        patch = self.pick(data)
        self.seed += 1
        patch.load_state_dict({name: torch.randn_like(value) * 0.1 for name, value in patch.state_dict().items()})

    @precondition(lambda self: any(not patch.merged for patch in self.order))
    @rule(data=st.data())
    def train(self, data: st.DataObject) -> None:
        patch = self.pick(data, [patch for patch in self.order if not patch.merged])
        parameters = [parameter.requires_grad_(True) for parameter in patch.parameters()]
        with adapters.use(self.case.model, {patch.name: 1.0}):
            loss = self.case.run(self.case.model, self.case.inputs).square().mean()
        with torch.no_grad():
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter -= 0.01 * gradient

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def eject(self, data: st.DataObject) -> None:
        patch = self.pick(data)
        patch.eject()
        self.order.remove(patch)
        self.out.append(patch)

    @precondition(lambda self: self.out)
    @rule(data=st.data())
    def inject_again(self, data: st.DataObject) -> None:
        patch = self.pick(data, self.out)
        if patch.name in adapters.patches(self.case.model):
            with pytest.raises(AdapterError):
                patch.inject()
        else:
            patch.inject()
            self.out.remove(patch)
            self.order.append(patch)

    @rule(call=st.sampled_from(["pattern", "name", "rows"]))
    def fail(self, call: str) -> None:
        before = snapshot(self.case.model)
        with pytest.raises(AdapterError):
            if call == "pattern":
                adapters.inject(self.case.model, LoRA(rank=1), targets="nowhere", name="new")
            elif call == "name":
                adapters.use(self.case.model, "nobody").__enter__()
            else:
                adapters.use(self.case.model, "nobody", rows=[]).__enter__()
        assert snapshot(self.case.model) == before

    @precondition(lambda self: self.order)
    @rule(data=st.data())
    def use(self, data: st.DataObject) -> None:
        chosen = data.draw(st.dictionaries(st.integers(0, len(self.order) - 1), st.sampled_from(SCALES)))
        with adapters.use(self.case.model, {self.order[place].name: scale for place, scale in chosen.items()}):
            self.check([(self.order[place], scale) for place, scale in chosen.items() if scale])

    @invariant()
    def computes_what_the_formula_says(self) -> None:
        if hasattr(self, "case"):
            self.check([(patch, patch.scale) for patch in self.order if patch.enabled and patch.scale])
            assert list(adapters.patches(self.case.model).values()) == self.order

    def check(self, active: list[tuple[Patch, float]]) -> None:
        if active:
            torch.testing.assert_close(self.case(), folded(self.name, active), rtol=1e-3, atol=1e-3)
        else:
            assert torch.equal(self.case(), self.base)

    def teardown(self) -> None:
        if not hasattr(self, "case"):
            return
        while self.order:
            self.order[0].eject()
            self.out.append(self.order.pop(0))
        assert snapshot(self.case.model) == self.before
        assert torch.equal(self.case(), self.base)
        gone = [weakref.ref(patch) for patch in self.out]
        self.out.clear()
        gc.collect()
        assert [ref() for ref in gone] == [None] * len(gone)
        self.folder.cleanup()


@pytest.mark.parametrize("count", [2, exhaustive(20)])
@pytest.mark.parametrize("name", BUILDERS)
def test_sequences(name: str, count: int) -> None:
    torch.default_generator.manual_seed(0)
    machine = type("Machine", (Sequences,), {"name": name})
    # A failure is shown as it is found: making a sequence of calls shorter would take minutes.
    phases = [Phase.explicit, Phase.generate]
    run_state_machine_as_test(machine, settings=settings(max_examples=count, stateful_step_count=20, phases=phases))
