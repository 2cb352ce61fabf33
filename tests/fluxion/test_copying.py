"""Tables that are made when they are asked for, and copies of modules that are made from a template."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fluxion as fl
from fluxion.copying import Template, lazy_attribute, shallow_copy

X = torch.ones(2, 3)
MODULES: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: fl.Linear(3, 3),
    "multiply": lambda: fl.Multiply(2.0),
    "chain": lambda: fl.Chain(fl.Linear(3, 3), fl.ReLU()),
    "torch": lambda: nn.Linear(3, 3),
}


@pytest.mark.parametrize("name", MODULES)
def test_a_copy_has_what_the_module_has(name: str) -> None:
    module = MODULES[name]()
    twin = shallow_copy(module)
    assert type(twin) is type(module)
    assert vars(twin).keys() <= vars(module).keys()
    for left_out in vars(module).keys() - vars(twin).keys():
        assert left_out in fl.Module._lazy_tables
        assert isinstance(getattr(type(module), left_out), lazy_attribute)
        assert getattr(module, left_out) == getattr(twin, left_out)
    for table in ("_parameters", "_buffers", "_modules"):
        one, two = getattr(module, table), getattr(twin, table)
        assert one is not two and list(one) == list(two)
        assert all(one[key] is two[key] for key in one)
    assert torch.equal(twin(X), module(X))


@pytest.mark.parametrize("name", MODULES)
def test_tables_that_are_asked_for_are_those_of_torch(name: str) -> None:
    twin = shallow_copy(MODULES[name]())
    for table, value in vars(nn.Linear(1, 1)).items():
        if isinstance(value, (dict, set)) and table not in ("_parameters", "_buffers", "_modules"):
            found = getattr(twin, table)
            assert type(found) is type(value) and not found
            assert getattr(twin, table) is found


REGISTER: list[Callable[[nn.Module, Callable[..., Any]], Any]] = [
    lambda module, hook: module.register_forward_hook(hook),
    lambda module, hook: module.register_forward_hook(hook, with_kwargs=True, always_call=True),
    lambda module, hook: module.register_forward_pre_hook(hook),
    lambda module, hook: module.register_full_backward_hook(hook),
    lambda module, hook: module.register_full_backward_pre_hook(hook),
    lambda module, hook: module.register_state_dict_post_hook(hook),
    lambda module, hook: module.register_state_dict_pre_hook(hook),
    lambda module, hook: module.register_load_state_dict_post_hook(hook),
    lambda module, hook: module.register_load_state_dict_pre_hook(hook),
]


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("register", REGISTER)
def test_a_hook_is_on_one_twin_alone(register: Callable[..., Any], name: str) -> None:
    module = MODULES[name]()
    twins = [shallow_copy(module) for _ in range(2)]
    calls: list[str] = []

    def run(some: nn.Module) -> int:
        calls.clear()
        x = X.clone().requires_grad_()
        some(x).sum().backward()
        some.load_state_dict(some.state_dict())
        return len(calls)

    handle = register(twins[0], lambda *_, **__: calls.append(""))
    assert run(twins[0]) == 1
    assert run(twins[1]) == run(module) == 0
    handle.remove()
    assert run(twins[0]) == 0


def test_what_a_module_has_when_it_is_copied_stays_with_the_copy() -> None:
    calls: list[nn.Module] = []
    module = fl.Linear(3, 3)
    handle = module.register_forward_hook(lambda self, *_: calls.append(self))
    twin = shallow_copy(module)
    handle.remove()
    module(X)
    twin(X)
    assert calls == [twin]


def test_a_template_is_of_its_time() -> None:
    module = fl.Multiply(2.0)
    template = Template(module)
    module.scale = 5.0
    first, second = template.copy(), template.copy()
    first.scale = 3.0
    assert (first.scale, second.scale, module.scale) == (3.0, 2.0, 5.0)


@pytest.mark.parametrize("name", MODULES)
def test_copies_of_a_copy(name: str) -> None:
    module = MODULES[name]()
    twin = shallow_copy(module)
    buffer = io.BytesIO()
    torch.save(twin, buffer)
    buffer.seek(0)
    for other in (
        copy.deepcopy(twin),
        shallow_copy(twin),
        pickle.loads(pickle.dumps(twin)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(X), module(X))
        calls: list[int] = []
        other.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        other(X)
        twin(X)
        assert calls == [1]
        assert list(other.state_dict()) == list(module.state_dict())


def test_threads_get_one_object() -> None:
    class Holder:
        slow = threading.Barrier(8)
        table = lazy_attribute(lambda self: (self.slow.wait(timeout=60), OrderedDict())[1])

    for _ in range(20):
        holder, found = Holder(), []
        threads = [threading.Thread(target=lambda: found.append(holder.table)) for _ in range(8)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 8
        assert all(table is holder.table for table in found)


def test_a_lazy_attribute_of_a_class_is_itself() -> None:
    assert isinstance(fl.Module._forward_hooks, lazy_attribute)


def test_hooks_of_a_thread_are_not_lost() -> None:
    twin, calls = shallow_copy(fl.Multiply(2.0)), []
    barrier = threading.Barrier(8)

    def register() -> None:
        barrier.wait(timeout=60)
        twin.register_forward_hook(lambda *_: calls.append(1))

    threads = [threading.Thread(target=register) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    twin(X)
    assert len(calls) == 8
