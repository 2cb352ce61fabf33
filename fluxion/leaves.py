"""Leaves that call a function, and leaves that read and write contexts."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Self

from fluxion.errors import ContextError
from fluxion.links import ContextModule
from fluxion.module import Module


class Lambda(Module):
    """Any function as a leaf.

    Example:
        >>> fl.Chain(fl.Lambda(lambda x: x.flip(0)), fl.Multiply(2.0))(torch.tensor([1.0, 2.0]))
        tensor([4., 2.])
    """

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        self.func = func

    def forward(self, *args: Any) -> Any:
        return self.func(*args)

    def __str__(self) -> str:
        name = getattr(self.func, "__name__", type(self.func).__name__)
        try:
            return f"Lambda({name}{inspect.signature(self.func)})"
        except (TypeError, ValueError):  # Some functions written in C have no signature.
            return f"Lambda({name})"


class UseContext(ContextModule):
    """Read of an entry of a context. Inputs are ignored.

    Raises:
        ContextError: No ancestor provides that context, or the entry is missing or None.

    Example:
        >>> model = fl.Chain(fl.UseContext("text", "embedding").compose(lambda x: 2 * x))
        >>> model.set_context("text", {"embedding": torch.ones(2)})
        >>> model()
        tensor([2., 2.])
    """

    def __init__(self, context: str, key: str) -> None:
        super().__init__()
        self.context = context
        self.key = key
        self.func: Callable[[Any], Any] | None = None

    def forward(self, *args: Any) -> Any:
        value = self.use_context(self.context).get(self.key)
        if value is None:
            raise ContextError(
                f"Context entry {self.context!r}.{self.key!r} is not set: set it with SetContext or set_context()."
            )
        return value if self.func is None else self.func(value)

    def compose(self, func: Callable[[Any], Any]) -> Self:
        """Apply a function to the value that is read. Returns this module."""
        self.func = func
        return self


class SetContext(ContextModule):
    """Write of the input to an entry of a context; returns the input.

    With a callback, calls `callback(value, input)` with the entry's value instead of replacing it.

    Raises:
        ContextError: No ancestor provides that context, or with a callback the entry is missing.

    Example:
        >>> model = fl.Chain(fl.SetContext("skip", "x"), fl.Multiply(2.0), fl.Parallel(fl.UseContext("skip", "x")))
        >>> model.set_context("skip", {})
        >>> model(torch.tensor([1.0]))
        (tensor([1.]),)
    """

    def __init__(self, context: str, key: str, callback: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        self.context = context
        self.key = key
        self.callback = callback

    def forward(self, x: Any) -> Any:
        context = self.use_context(self.context)
        if self.callback is None:
            context[self.key] = x
        elif self.key in context:
            self.callback(context[self.key], x)
        else:
            raise ContextError(f"Context entry {self.context!r}.{self.key!r} is not set: give it a value first.")
        return x
