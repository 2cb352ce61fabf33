"""Contexts in compiled calls: one graph, right in every thread and task, with nothing left behind."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import fluxion as fl

X = torch.zeros(2)


@pytest.fixture
def counter() -> CompileCounter:
    torch._dynamo.reset()
    return CompileCounter()


def reader() -> fl.Chain:
    return fl.Chain(fl.Chain(fl.UseContext("a", "b"), fl.Multiply(2.0)))


def test_new_values_need_no_new_graph(counter: CompileCounter) -> None:
    chain = reader()
    compiled = torch.compile(chain, fullgraph=True, backend=counter)
    for value in range(5):
        chain.set_context("a", {"b": torch.full((2,), float(value))})
        assert torch.equal(compiled(X), torch.full((2,), 2.0 * value))
    assert counter.frame_count == 1


def test_what_was_set_is_used_up(counter: CompileCounter) -> None:
    chain = reader()
    compiled = torch.compile(chain, backend=counter)
    chain.set_context("a", {"b": X + 1})
    compiled(X)
    with pytest.raises(fl.ContextError, match=r"is not set above Chain\.Chain") as caught:
        compiled(X)
    assert len(caught.value.__notes__) == 1
    with pytest.raises(fl.ContextError):
        chain(X)


def test_set_and_called_inside_of_compiled_code(counter: CompileCounter) -> None:
    chain = reader()

    @torch.compile(fullgraph=True, backend=counter)
    def step(x: Tensor) -> Tensor:
        chain.set_context("a", {"b": x + 1})
        return chain(x)

    def run() -> None:
        for value in range(3):
            assert torch.equal(step(X + value), 2 * (X + value + 1))

    run()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
    with pytest.raises(fl.ContextError):
        chain(X)


def test_two_threads(counter: CompileCounter) -> None:
    chain = reader()
    compiled = torch.compile(chain, fullgraph=True, backend=counter)
    barrier = threading.Barrier(2)

    def work(number: int) -> bool:
        right = True
        for step in range(20):
            value = torch.full((2,), float(100 * number + step))
            chain.set_context("a", {"b": value})
            barrier.wait(timeout=60)
            right &= torch.equal(compiled(X), 2 * value)
        return right

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, range(2))) == [True, True]


def test_tasks(counter: CompileCounter) -> None:
    chain = reader()
    compiled = torch.compile(chain, fullgraph=True, backend=counter)

    async def work(number: int) -> bool:
        right = True
        for step in range(5):
            value = torch.full((2,), float(100 * number + step))
            chain.set_context("a", {"b": value})
            await asyncio.sleep(0.001 * ((number * 7) % 3))
            right &= torch.equal(compiled(X), 2 * value)
        return right

    async def main() -> list[bool]:
        return await asyncio.gather(*map(work, range(4)))

    assert all(asyncio.run(main()))
    assert counter.frame_count == 1


def test_errors_of_compiled_code_keep_their_type(counter: CompileCounter) -> None:
    def fail(x: Tensor) -> Tensor:
        raise ArithmeticError("mine")

    compiled = torch.compile(fl.Chain(fl.Linear(2, 2), fl.Lambda(fail)), backend=counter)
    with pytest.raises(ArithmeticError) as caught:
        compiled(X)
    assert caught.value.__notes__[0].startswith("Chain.Lambda failed on")


def test_errors_are_caught_inside_of_compiled_code(counter: CompileCounter) -> None:
    def fail(x: Tensor) -> Tensor:
        raise ArithmeticError

    chain = fl.Chain(fl.Identity(), fl.Sum(fl.Lambda(fail)))

    @torch.compile(fullgraph=True, backend=counter)
    def step(x: Tensor) -> Tensor:
        try:
            return chain(x)
        except ArithmeticError:
            return x + 1

    assert torch.equal(step(X), X + 1)


def test_a_compiled_child_reads_the_context_of_the_running_call(counter: CompileCounter) -> None:
    class Provides(fl.Chain):
        def init_context(self) -> fl.Contexts:
            return {"a": {"b": None}}

    block = fl.Chain(fl.UseContext("a", "b"), fl.Multiply(2.0))
    block.compile(backend=counter)
    chain = Provides(fl.SetContext("a", "b"), block)
    for value in range(3):
        assert torch.equal(chain(X + value), 2 * (X + value))
