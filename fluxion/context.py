"""Values that travel through the tree beside the inputs.

A chain that overrides `init_context` provides contexts to everything below it. A node looks a context up from its
parent towards the root at the moment it needs it. What is read and written belongs to one call of the root: it starts
from `init_context`, plus what `set_context` prepared for that call in the same thread or task, and is dropped when the
call ends, by an exception too.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Iterator
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch

if TYPE_CHECKING:
    from fluxion.chain import Chain

Context = dict[str, Any]
Contexts = dict[str, Context]
_T = TypeVar("_T")


class _Box(Generic[_T]):
    def __init__(self, value: _T) -> None:
        self.value = value


class _Local(Generic[_T]):
    """A value of the current thread or async task.

    torch.compile can trace a thread-local but not a context variable, so compiled code goes through a thread-local
    that holds the same box.
    """

    def __init__(self, name: str, default: _T) -> None:
        self._default = default
        self._variable: ContextVar[_Box[_T] | None] = ContextVar(name, default=None)
        self._thread = threading.local()

    def _box(self) -> _Box[_T] | None:
        if torch.compiler.is_compiling():
            return getattr(self._thread, "box", None)
        return self._variable.get()

    def get(self) -> _T:
        box = self._box()
        return self._default if box is None else box.value

    def set(self, value: _T) -> None:
        if torch.compiler.is_compiling() and (box := self._box()) is not None:
            box.value = value
            return
        # A new box, so that tasks that inherited the old one do not see the change.
        self._thread.box = box = _Box(value)
        if not torch.compiler.is_compiling():
            self._variable.set(box)


class _Call:
    """One running call of a root: what its providers hold for as long as it lasts."""

    def __init__(self, root: Chain, contexts: dict[ContextProvider, Contexts]) -> None:
        self.root = root
        self.contexts = contexts


# What set_context prepared for the next call, and the innermost call that is running.
_prepared: _Local[dict[ContextProvider, Contexts]] = _Local("prepared", {})
_running: _Local[_Call | None] = _Local("running", None)


class ContextProvider:
    """The contexts that one chain offers to its descendants, as the current thread or task sees them."""

    def __init__(self, chain: Chain) -> None:
        self._chain = weakref.ref(chain)

    @property
    def chain(self) -> Chain | None:
        """The chain these contexts belong to, or None when it is gone."""
        return self._chain()

    @property
    def contexts(self) -> Contexts:
        """All contexts of this provider by name. Inside a call, changes to them last until the call ends."""
        call = _running.get()
        chain = self.chain
        if chain is None:
            return {}
        if call is not None and call.root is chain.root:
            if self not in call.contexts:
                call.contexts[self] = chain.init_context()
            return call.contexts[self]
        return chain.init_context() | _prepared.get().get(self, {})

    def get_context(self, key: str) -> Context | None:
        """The context of that name, or None."""
        return self.contexts.get(key)

    def set_context(self, key: str, value: Context) -> None:
        """Set a context, for the running call or else for the next one of this thread or task."""
        self.update_contexts({key: value}, replace=True)

    def update_contexts(self, new_contexts: Contexts, replace: bool = False) -> None:
        """Set several contexts. Entries of a context that is there already are kept unless `replace`."""
        chain, call = self.chain, _running.get()
        if chain is None:
            return
        inside = call is not None and call.root is chain.root
        contexts = self.contexts
        for name, value in new_contexts.items():
            contexts[name] = dict(value) if replace else contexts.get(name, {}) | value
        if not inside:
            alive = {p: c for p, c in _prepared.get().items() if p.chain is not None}
            _prepared.set(alive | {self: contexts})

    def __repr__(self) -> str:
        return f"{type(self).__name__}(contexts={self.contexts!r})"


@contextlib.contextmanager
def call_of(root: Chain) -> Iterator[None]:
    """Run a call of `root` with contexts of its own."""
    outer = _running.get()
    prepared = _prepared.get()
    own: dict[ContextProvider, Contexts] = {}
    others: dict[ContextProvider, Contexts] = {}
    for provider, contexts in prepared.items():
        chain = provider.chain
        if chain is not None:
            (own if chain.root is root else others)[provider] = contexts
    if own:
        _prepared.set(others)
    _running.set(_Call(root, own))
    try:
        yield
    finally:
        _running.set(outer)


def is_running(root: Chain) -> bool:
    """Whether a call of that root is under way in this thread or task."""
    call = _running.get()
    return call is not None and call.root is root
