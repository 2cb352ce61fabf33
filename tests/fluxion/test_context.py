"""Contexts: looked up on the way to the root, at the moment they are used, and gone with the call."""

import asyncio
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context

import pytest
import torch
from torch import Tensor

import fluxion as fl


class Provides(fl.Chain):
    """Provides `"box"` with an entry `"value"`, which is a 7 unless something else is written to it."""

    def init_context(self) -> fl.Contexts:
        return {"box": {"value": 7.0, "list": []}}


def read(entry: str = "value") -> fl.UseContext:
    return fl.UseContext("box", entry)


X = torch.zeros(1)


def test_written_and_read_further_on() -> None:
    chain = Provides(
        fl.Multiply(1.0, 2.0), fl.SetContext("box", "value"), fl.Multiply(10.0), fl.Sum(fl.Identity(), read())
    )
    assert chain(X) == 22.0


def test_compose_and_callback() -> None:
    chain = Provides(
        fl.SetContext("box", "list", callback=lambda seen, x: seen.append(x + 1)),
        read("list").compose(lambda seen: seen.pop()),
    )
    assert chain(X) == 1.0
    assert chain(X) == 1.0


def test_every_call_starts_from_init_context() -> None:
    chain = Provides(read(), fl.Lambda(lambda value: value + X), fl.SetContext("box", "value"))
    assert chain(X) == 7.0
    assert chain(X) == 7.0
    assert chain.provider.contexts == {"box": {"value": 7.0, "list": []}}


@pytest.mark.parametrize("kind", [fl.Chain, fl.Sum, fl.Parallel, fl.Passthrough, fl.Residual, fl.Concatenate])
def test_a_root_of_any_kind_starts_afresh(kind: type[fl.Chain]) -> None:
    class Root(kind):  # type: ignore[misc, valid-type]
        def init_context(self) -> fl.Contexts:
            return {"box": {"list": []}}

    seen: list[int] = []
    root = Root(fl.SetContext("box", "list", callback=lambda entry, x: (entry.append(x), seen.append(len(entry)))))
    root(X)
    root(X)
    assert seen == [1, 1]
    assert root.use_context("box") == {"list": []}


def test_nearest_provider_wins() -> None:
    inner = Provides(read())
    outer = fl.Chain(fl.Sum(inner, fl.Chain(read())))
    outer.set_context("box", {"value": 1.0})
    assert outer(X) == 8.0


def test_what_is_set_lasts_for_one_call() -> None:
    chain = fl.Chain(fl.Chain(read()))
    for value in (1.0, 2.0):
        chain.set_context("box", {"value": value})
        assert chain(X) == value  # A second value is never hidden by what a child remembers of the first.
    with pytest.raises(fl.ContextError, match=r"'box' is not set above Chain.Chain: declare it in init_context\(\)"):
        chain(X)


def test_set_adds_to_what_init_context_provides() -> None:
    chain = Provides(read())
    chain.set_context("other", {"x": 1.0})
    assert chain(X) == 7.0
    chain.provider.update_contexts({"box": {"value": 3.0}})
    assert chain.use_context("box") == {"value": 3.0, "list": []}
    assert chain(X) == 3.0
    assert chain(X) == 7.0


def test_set_between_prepare_and_call_of_another_root() -> None:
    first, second = fl.Chain(read()), fl.Chain(read())
    first.set_context("box", {"value": 1.0})
    second.set_context("box", {"value": 2.0})
    assert second(X) == 2.0
    assert first(X) == 1.0


def test_set_on_an_inner_chain() -> None:
    inner = fl.Chain(read())
    root = fl.Chain(fl.Identity(), inner)
    inner.set_context("box", {"value": 5.0})
    assert root(X) == 5.0


def test_calling_an_inner_chain_uses_its_ancestors() -> None:
    inner = fl.Chain(read())
    root = Provides(fl.Chain(inner))
    assert inner(X) == 7.0
    root.set_context("box", {"value": 1.0})
    assert inner(X) == 1.0
    assert inner(X) == 7.0


def test_missing_context_is_never_silent() -> None:
    for leaf in (fl.SetContext("nowhere", "x"), fl.UseContext("nowhere", "x")):
        with pytest.raises(fl.ContextError, match="'nowhere' is not set above Chain"):
            fl.Chain(leaf)(X)
    with pytest.raises(fl.ContextError, match=r"'box'\.'nothing' is not set"):
        Provides(read("nothing"))(X)
    with pytest.raises(fl.ContextError, match=r"'box'\.'nothing' is not set"):
        Provides(fl.SetContext("box", "nothing", callback=print))(X)
    with pytest.raises(fl.ChainValueError, match="has no parent"):
        fl.UseContext("box", "value")(X)


def fail(x: Tensor) -> Tensor:
    raise ArithmeticError


def test_an_exception_leaves_nothing_behind() -> None:
    big: list[weakref.ref[Tensor]] = []

    def remember(x: Tensor) -> Tensor:
        big.append(weakref.ref(x))
        return x

    chain = Provides(fl.Lambda(lambda x: x + 1), fl.Lambda(remember), fl.SetContext("box", "value"), fl.Lambda(fail))
    chain.set_context("more", {"tensor": torch.ones(3)})
    with pytest.raises(ArithmeticError):
        chain(X)
    assert chain.provider.contexts == {"box": {"value": 7.0, "list": []}}
    assert big[0]() is None
    chain.pop()
    chain.append(fl.UseContext("more", "tensor"))
    with pytest.raises(fl.ContextError):
        chain(X)


def test_a_popped_subtree_keeps_nothing_of_its_parent() -> None:
    inner = fl.Chain(read())
    root = Provides(fl.SetContext("box", "value"), inner)
    tensor = torch.ones(1)
    gone = weakref.ref(tensor)
    root(tensor)
    root.pop()
    del tensor
    assert gone() is None
    with pytest.raises(fl.ContextError):
        inner(X)


def test_what_was_prepared_dies_with_the_chain() -> None:
    chain = fl.Chain(read())
    tensor = torch.ones(1)
    gone = weakref.ref(tensor)
    chain.set_context("box", {"value": tensor})
    del chain, tensor
    gc.collect()
    fl.Chain().set_context("unrelated", {})
    assert gone() is None


def test_a_call_inside_a_call() -> None:
    inner_root = Provides(fl.SetContext("box", "value"), fl.Multiply(2.0), read())
    # In a list, as a function would hold it: it is no child, and its call is one of its own.
    outer = Provides(
        fl.SetContext("box", "value"), fl.Lambda(lambda x: inner_root(x + 1)), fl.Sum(fl.Identity(), read())
    )
    assert outer(X + 5) == 6 + 5
    again = Provides(fl.SetContext("box", "value"), fl.Lambda(lambda x: x if x > 3 else again(x + 1)), read())
    assert again(X) == 0.0


def test_an_inner_call_that_fails_and_is_caught() -> None:
    inner = Provides(fl.SetContext("box", "value"), fl.Lambda(fail))

    def attempt(x: Tensor) -> Tensor:
        with pytest.raises(ArithmeticError):
            inner(x + 1)
        return x

    assert Provides(fl.SetContext("box", "value"), fl.Lambda(attempt), fl.Multiply(0.0), read())(X + 3) == 3.0


def waiting(barrier: threading.Barrier) -> Callable[[Tensor], Tensor]:
    def wait(x: Tensor) -> Tensor:
        barrier.wait(timeout=10)
        return x

    return wait


def test_threads_do_not_see_each_other() -> None:
    count = 4
    barrier = threading.Barrier(count)
    # All threads have written before any reads, in every call.
    chain = Provides(
        fl.SetContext("box", "value"),
        fl.Lambda(waiting(barrier)),
        fl.Multiply(0.0),
        fl.Sum(read(), fl.UseContext("mine", "x")),
    )

    def work(number: int) -> list[float]:
        out = []
        for step in range(20):
            chain.set_context("mine", {"x": torch.tensor([100.0 * number])})
            barrier.wait(timeout=10)
            out.append(float(chain(torch.tensor([float(step)]))))
        return out

    with ThreadPoolExecutor(count) as pool:
        results = list(pool.map(work, range(count)))
    assert results == [[100.0 * number + step for step in range(20)] for number in range(count)]


def test_first_use_of_a_context_by_many_threads() -> None:
    for _ in range(50):
        chain = fl.Chain(read())
        barrier = threading.Barrier(4)

        def work(number: int, chain: fl.Chain = chain, barrier: threading.Barrier = barrier) -> float:
            barrier.wait(timeout=10)
            chain.set_context("box", {"value": number})
            return float(chain(X))

        with ThreadPoolExecutor(4) as pool:
            assert list(pool.map(work, range(4))) == [0, 1, 2, 3]


def test_async_tasks_do_not_see_each_other() -> None:
    chain = fl.Chain(read())

    async def work(number: int) -> bool:
        right = True
        for step in range(5):
            chain.set_context("box", {"value": (number, step)})
            await asyncio.sleep(0.001 * ((number * 7) % 3))
            right &= chain(X) == (number, step)
        return right

    async def main() -> list[bool]:
        return await asyncio.gather(*map(work, range(6)))

    assert all(asyncio.run(main()))


def test_a_task_inherits_what_was_prepared_and_keeps_its_own_use_of_it() -> None:
    chain = fl.Chain(read())
    chain.set_context("box", {"value": 1.0})
    assert copy_context().run(chain, X) == 1.0
    assert chain(X) == 1.0


def test_read_from_a_leaf_and_from_a_chain() -> None:
    leaf = read()
    chain = Provides(leaf)
    assert leaf.use_context("box") == chain.use_context("box")
    assert leaf.provider is chain.provider
    assert chain.provider.get_context("box") == {"value": 7.0, "list": []}
    assert chain.provider.get_context("nothing") is None
    assert repr(chain.provider) == "ContextProvider(contexts={'box': {'value': 7.0, 'list': []}})"


def test_a_provider_without_its_chain() -> None:
    provider = Provides().provider
    assert provider.chain is None
    assert provider.contexts == {}
    with pytest.raises(fl.ContextError, match="is gone"):
        provider.set_context("box", {})


def test_a_shared_reader_reads_for_each_use() -> None:
    leaf = read("list").compose(len)
    push = fl.SetContext("box", "list", callback=lambda entry, x: entry.append(x))
    chain = Provides(fl.Parallel(fl.Identity()), fl.GetArg(0), push, leaf, push, leaf)
    assert chain(X) == 2


def test_a_provider_shows_what_its_descendants_are_given() -> None:
    child = fl.Chain()
    parent = Provides(fl.Chain(child))
    parent.set_context("box", {"value": 1.0})
    assert child.provider.get_context("box") == {"value": 1.0}
    assert parent.pop(0)[0] is child
    assert child.provider.get_context("box") is None
