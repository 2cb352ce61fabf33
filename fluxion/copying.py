"""Shallow and structural copies of modules, and attributes that are made when first read."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class lazy_attribute:  # noqa: N801 - It is used like `property`.
    """An attribute that is made when it is first read, and belongs to the object from then on.

    Example:
        >>> class Node:
        ...     tags = lazy_attribute(lambda node: [])
        >>> node = Node()
        >>> node.tags.append("seen"), node.tags
        (None, ['seen'])
    """

    def __init__(self, make: Callable[[Any], Any], name: str = "") -> None:
        """
        Args:
            make: Makes the value from the object.
            name: The attribute's name, for a descriptor that is set on a class after the class statement.
        """
        self._make, self._name = make, name

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return instance.__dict__.setdefault(self._name, self._make(instance))  # One object for all threads.


class Template(Generic[M]):
    """Snapshot of a module from which many shallow copies are made; its attributes are sorted out once.

    A copy shares parameters, buffers and children, and has its own dicts and sets one level deep: the tables of
    parameters, buffers, children and hooks, and private attributes. Empty ones in the class's `_lazy_tables` are left
    out.

    Example:
        >>> template = Template(fl.Linear(2, 2))
        >>> first, second = template.copy(), template.copy()
        >>> first.weight is second.weight, first._parameters is second._parameters
        (True, False)
    """

    def __init__(self, module: M) -> None:
        self._class = type(module)
        self._shared: dict[str, Any] = {}
        self._copied: list[tuple[str, Callable[[], Any]]] = []
        lazy = getattr(self._class, "_lazy_tables", ())
        for name, value in vars(module).items():
            if not isinstance(value, (dict, set)):
                self._shared[name] = value
            elif value or name not in lazy:
                self._copied.append((name, value.copy))

    def copy(self) -> M:
        """Shallow copy of the module."""
        clone = self._class.__new__(self._class)
        self.fill(clone.__dict__)
        return clone

    def fill(self, state: dict[str, Any]) -> None:
        """Update the `__dict__` of another module with the attributes of a shallow copy."""
        state.update(self._shared)
        for name, copied in self._copied:
            state[name] = copied()


def shallow_copy(module: M) -> M:
    """Copy of a module that shares parameters, buffers and children, with its own tables of them and of hooks."""
    return Template(module).copy()


def structural_copy(module: M) -> M:
    """Copy of the tree in which chains are new and leaves, with their parameters, are shared.

    Calls `module.structural_copy()`; a module that has no such method is a leaf, and is returned itself.

    Example:
        >>> model = fl.Chain(fl.Linear(2, 2))
        >>> copy = fl.structural_copy(model)
        >>> copy is model, copy.Linear is model.Linear
        (False, True)
    """
    copy = getattr(type(module), "structural_copy", None)
    return module if copy is None else copy(module)
