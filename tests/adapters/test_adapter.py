"""Adapters written by hand: a chain with the `Adapter` mixin, in chains and in plain modules."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import adapters
import fluxion as fl
from adapters import Adapter, LoRA, PatchStateError, TargetError
from tests.adapters.models import build, perturb, snapshot


class Doubled(fl.Chain, Adapter[nn.Module]):
    def __init__(self, target: nn.Module, factor: float = 2.0) -> None:
        with self.setup_adapter(target):
            super().__init__(target, fl.Multiply(factor))


class Shifted(fl.Chain, Adapter[nn.Module]):
    def __init__(self, target: nn.Module) -> None:
        with self.setup_adapter(target):
            super().__init__(fl.Chain(target), fl.Multiply(bias=1.0))


@pytest.fixture
def chain() -> fl.Chain:
    torch.default_generator.manual_seed(0)
    return fl.Chain(fl.Chain(fl.Linear(2, 2), fl.ReLU()), fl.Linear(2, 2))


def test_around_a_leaf_and_back(chain: fl.Chain) -> None:
    inner, linear, x = chain.Chain, chain.Chain.Linear, torch.randn(3, 2)
    before, output = snapshot(chain), linear(x)
    adapter = Doubled(linear)
    assert inner[0] is linear
    assert adapter.inject(inner) is adapter
    assert inner[0] is adapter
    assert adapter.parent is inner
    assert adapter.target is linear
    assert list(inner._modules) == ["Linear", "ReLU"]
    assert torch.equal(inner[0](x), output * 2)
    adapter.eject()
    assert adapter.parent is None
    assert snapshot(chain) == before
    adapter.inject(chain)
    assert inner[0] is adapter


def test_around_a_chain_that_knows_its_parent(chain: fl.Chain) -> None:
    before, inner = snapshot(chain), chain.Chain
    adapter = Shifted(inner)
    assert inner.parent is chain
    adapter.inject()
    assert chain[0] is adapter
    assert inner.parent is adapter[0]
    with pytest.raises(PatchStateError, match="eject it first"):
        chain.structural_copy()
    adapter.eject()
    assert inner.parent is chain
    assert snapshot(chain) == before


def test_in_a_plain_module() -> None:
    case = build("plain")
    before, output = snapshot(case.model), case()
    adapter = Doubled(case.model.steps[0]).inject(case.model)
    assert case.model.steps[0] is adapter
    assert case.model.alias is adapter
    assert not torch.equal(case(), output)
    adapter.eject()
    assert snapshot(case.model) == before


def test_every_use_of_a_shared_leaf() -> None:
    linear, x = fl.Linear(2, 2), torch.randn(1, 2)
    chain = fl.Chain(linear, fl.Sum(fl.Chain(linear), fl.Identity()))
    adapter = Doubled(linear).inject(chain)
    assert torch.equal(chain(x), 2 * linear(2 * linear(x)) + 2 * linear(x))
    adapter.eject()
    assert chain[0] is linear
    assert chain[1][0][0] is linear


def test_refusals_change_nothing(chain: fl.Chain) -> None:
    linear = chain.Chain.Linear
    adapter = Doubled(linear).inject(chain)
    before = snapshot(chain)
    with pytest.raises(PatchStateError, match="injected already"):
        adapter.inject(chain)
    with pytest.raises(TargetError, match="does not know its parent"):
        Doubled(fl.Linear(1, 1)).inject()
    with pytest.raises(TargetError, match="is not below"):
        Doubled(fl.Linear(1, 1)).inject(chain)
    with pytest.raises(PatchStateError, match="not injected"):
        Doubled(linear).eject()
    with pytest.raises(TypeError, match="Wrong must be a chain"):
        type("Wrong", (Adapter,), {})
    assert snapshot(chain) == before


def test_a_constructor_that_fails_leaves_the_target_as_it_was(chain: fl.Chain) -> None:
    class Failing(fl.Chain, Adapter[fl.Chain]):
        def __init__(self, target: fl.Chain) -> None:
            with self.setup_adapter(target):
                super().__init__(target)
                raise RuntimeError("simulated")

    inner = chain.Chain
    with pytest.raises(RuntimeError, match="simulated"):
        Failing(inner)
    assert chain.pop(0) is inner
    assert inner.parent is None


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0), (0, 2, 1), (2, 0, 1)])
@pytest.mark.parametrize("prepared", [True, False])
def test_stacks_are_ejected_in_any_order_and_go_back(chain: fl.Chain, order: tuple[int, ...], prepared: bool) -> None:
    linear, x = chain.Chain.Linear, torch.randn(3, 2)
    before = snapshot(chain)
    if prepared:  # All made for the linear layer before any of them is injected.
        stack = [Doubled(linear), Shifted(linear), Doubled(linear, 3.0)]
        for adapter in stack:
            adapter.inject(chain)
    else:  # Each made for what it finds in the place of the linear layer.
        stack = []
        for make in (Doubled, Shifted, Doubled):
            stack.append(make(chain.Chain[0]).inject(chain.Chain))
    for _ in range(2):
        for number, index in enumerate(order):
            stack[index].eject()
            left = [stack[other] for other in order[number + 1 :]]
            held = [module for module in chain.modules() if isinstance(module, Adapter)]
            assert {id(module) for module in held} == {id(adapter) for adapter in left}
        assert snapshot(chain) == before
        assert all(adapter.target is linear for adapter in stack if prepared)
        if not prepared:
            break
        for adapter in stack:
            adapter.inject(chain)
    chain(x)


def test_together_with_patches(chain: fl.Chain) -> None:
    x = torch.randn(3, 2)
    before, base = snapshot(chain), chain(x)
    linear = chain.Chain.Linear
    patch = adapters.inject(chain, LoRA(rank=1), name="a")
    perturb(patch)
    adapted = linear(x) + chain.Chain[0].branches[0](x)
    outside = Doubled(chain.Chain[0]).inject(chain.Chain)
    inside = Shifted(linear).inject(chain)
    expected = (adapted + 1) * 2
    torch.testing.assert_close(chain.Chain[0](x), expected)
    patch.merge()
    torch.testing.assert_close(chain.Chain[0](x), expected)
    with adapters.use(chain):
        torch.testing.assert_close(chain.Chain[0](x), (linear_base(patch, linear, x) + 1) * 2)
    patch.eject()
    torch.testing.assert_close(chain.Chain[0](x), (linear(x) + 1) * 2)
    outside.eject()
    assert chain.Chain[0] is inside
    inside.eject()
    assert snapshot(chain) == before
    assert torch.equal(chain(x), base)


def linear_base(patch: adapters.Patch, linear: fl.Linear, x: Tensor) -> Tensor:
    patch.unmerge()
    output = linear(x)
    patch.merge()
    return output


@torch.no_grad()
def test_a_structural_copy_knows_what_is_merged_into_the_layers_it_shares(chain: fl.Chain) -> None:
    first, second = (adapters.inject(chain, adapters.LoRA(rank=1), name=name) for name in ("first", "second"))
    for patch in (first, second):
        perturb(patch)
    early, x = chain.structural_copy(), torch.randn(1, 2)
    expected = chain(x)
    first.merge()
    late = chain.structural_copy()
    for clone in (early, late):
        torch.testing.assert_close(clone(x), expected)
        clone.load_state_dict(clone.state_dict())
    torch.testing.assert_close(chain(x), expected)
    with adapters.use(early, "second"):
        alone = early(x)
    first.unmerge()
    for clone in (early, late):
        assert torch.equal(clone(x), expected)
        with adapters.use(chain, "second"):
            torch.testing.assert_close(clone(x), alone)


def test_structural_copies_have_adapters_of_their_own(chain: fl.Chain) -> None:
    linear = chain.Chain.Linear
    adapter = Doubled(linear).inject(chain)
    clone = chain.structural_copy()
    twin = clone.layer(("Chain", "Doubled"), Doubled)
    assert twin is not adapter
    assert twin.parent is clone.Chain
    assert twin.target is linear
    x = torch.randn(1, 2)
    assert torch.equal(clone(x), chain(x))
    adapter.eject()
    assert not torch.equal(clone(x), chain(x))
