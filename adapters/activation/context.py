"""The activation of the current thread or async task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextvars import ContextVar

from adapters.activation.mixed_batch import Rows
from adapters.activation.switch import Switch

Activation = Mapping[Switch, float | Rows]
"""A strength for each patch, or a mixed batch. Patches that are not in it follow their own switch."""

_current: ContextVar[Activation | None] = ContextVar("activation", default=None)
current = _current.get


@contextlib.contextmanager
def activated(activation: Activation) -> Iterator[None]:
    """Add to the activation, in this block and in this thread or async task.

    Example:
        >>> with activated({patch: 0.5}):
        ...     model(x)
    """
    token = _current.set({**(_current.get() or {}), **activation})
    try:
        yield
    finally:
        _current.reset(token)
