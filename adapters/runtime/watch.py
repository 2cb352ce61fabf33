"""`Watch`, which notices in less than a microsecond that somebody changed modules by hand."""

from __future__ import annotations

from collections.abc import Iterable
from operator import is_
from typing import Any

from torch import nn

# Attributes that make a call of a module more than its class says, where they are set.
_EXTRAS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    *("forward", "_compiled_call_impl"),
)


def extras_of(state: dict[str, Any]) -> list[str]:
    """The attributes of a module, of this `__dict__`, that would be hooks or a `forward` of its own."""
    return [name for name in _EXTRAS if name in state]


class Watch:
    """Modules as they were found: their attributes, children, parameters and numbers, without hooks.

    Parameters are watched by identity, and numbers only in modules without any.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._tables: list[dict[str, Any]] = []
        entries: list[tuple[dict[str, Any], str]] = []
        extras: list[tuple[dict[str, Any], str]] = []
        for module in modules:
            state, children, own = vars(module), module._modules, module._parameters
            self._tables.append(state)
            extras += [(state, name) for name in extras_of(state)]
            if children:
                self._tables.append(children)
                entries += [(state, "_modules"), *((children, key) for key in children)]
            elif own:
                self._tables.append(own)
                entries += [(own, name) for name in own]
            else:
                entries += [(state, name) for name, value in state.items() if not isinstance(value, (dict, set))]
        self._sizes = [*map(len, self._tables)]
        self._owners, self._names = [owner for owner, _ in entries], [name for _, name in entries]
        self._values = [owner[name] for owner, name in entries]
        self._extras = extras

    def holds(self) -> bool:
        """Whether everything is as it was found, and no module has a hook or a `forward` of its own."""
        return (
            [*map(len, self._tables)] == self._sizes
            and all(map(is_, map(dict.get, self._owners, self._names), self._values))
            and not (self._extras and any(state.get(name) for state, name in self._extras))
        )
