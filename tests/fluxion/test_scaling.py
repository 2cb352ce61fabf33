"""What the tree costs: linear in its size and in its depth. Steps are counted where clocks would be unsure."""

import gc
import sys
from collections.abc import Callable
from types import FrameType

import pytest
import torch

import fluxion as fl


def count_calls(run: Callable[[], object]) -> int:
    """How many Python and C functions a function calls."""
    count = 0

    def tick(frame: FrameType, event: str, arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    gc.disable()  # Calls by the collector would be counted too.
    sys.setprofile(tick)
    try:
        run()
    finally:
        sys.setprofile(None)
        gc.enable()
    return count


def nested(depth: int, leaf: torch.nn.Module, kind: type[fl.Chain] = fl.Chain) -> fl.Chain:
    chain = kind(leaf)
    for _ in range(depth - 1):
        chain = kind(chain)
    return chain


def test_five_hundred_levels() -> None:
    chain = nested(500, fl.Linear(1, 1))
    x = torch.ones(1, 1)
    assert torch.equal(chain(x), chain.ensure_find(fl.Linear)(x))
    chain(x).sum().backward()
    assert len(list(chain.named_parameters())) == 2
    assert chain.to(torch.float64).dtype == torch.float64
    assert chain.structural_copy()(x.double()).shape == (1, 1)
    assert (
        chain.ensure_find(fl.Linear).get_path(chain.ensure_find_parent(chain.ensure_find(fl.Linear))).count(".") == 500
    )


@pytest.mark.parametrize("kind", [fl.Sum, fl.Parallel, fl.Residual, fl.Passthrough, fl.Concatenate])
def test_two_hundred_and_fifty_levels_of_any_kind(kind: type[fl.Chain]) -> None:
    assert nested(250, fl.Identity(), kind)(torch.zeros(1)) is not None


@pytest.mark.parametrize("kind", [fl.Chain, fl.Sum])
def test_a_call_is_linear_in_depth(kind: type[fl.Chain]) -> None:
    small, large = nested(50, fl.Identity(), kind), nested(200, fl.Identity(), kind)
    x = torch.ones(1)
    assert count_calls(lambda: large(x)) < 4.2 * count_calls(lambda: small(x))


def test_context_is_linear_in_depth() -> None:
    class Provides(fl.Chain):
        def init_context(self) -> fl.Contexts:
            return {"a": {"b": 1.0}}

    def steps(depth: int) -> int:
        root = Provides(nested(depth, fl.UseContext("a", "b")))
        return count_calls(lambda: root(torch.ones(1)))

    assert steps(200) < 4.2 * steps(50)


def test_appending_is_linear() -> None:
    def steps(count: int) -> int:
        chain, leaves = fl.Chain(), [fl.Identity() for _ in range(count)]
        return count_calls(lambda: [chain.append(leaf) for leaf in leaves])

    assert steps(4000) < 4.1 * steps(1000)


def test_replacing_in_a_wide_chain_takes_constant_time() -> None:
    def steps(count: int) -> int:
        chain = fl.Chain(fl.Identity() for _ in range(count))
        children = list(chain)
        chain.key_of(children[0])  # The index is built once.

        def replace() -> None:
            for old in children[:: count // 10]:
                chain.replace(old, fl.Chain())

        return count_calls(replace)

    assert steps(10_000) == steps(100)


def test_building_from_the_leaves_up_is_linear() -> None:
    def steps(depth: int) -> int:
        return count_calls(lambda: nested(depth, fl.Identity()))

    assert steps(800) < 8.2 * steps(100)
