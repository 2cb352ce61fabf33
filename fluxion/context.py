"""Contexts: values that travel through the tree beside the inputs.

A chain that overrides `init_context` provides contexts to everything below it. A node looks a context up from its
parent towards the root when it needs it. Contexts belong to one call of the root: they start as `init_context` gives
them, updated by `set_context` calls made before in the same thread or task, and are dropped when the call ends, also by
an exception.
"""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from typing import Any, Protocol

import torch

from fluxion.errors import ContextError

Context = dict[str, Any]
Contexts = dict[str, Context]
ByProvider = dict["ContextProvider", Contexts]


class ProvidesContexts(Protocol):
    """A node of a tree with contexts of its own: all that is needed of a chain here."""

    @property
    def parent(self) -> ProvidesContexts | None: ...
    @property
    def root(self) -> ProvidesContexts: ...
    @property
    def provider(self) -> ContextProvider: ...
    def init_context(self) -> Contexts: ...


class Call:
    """A running call of a root, and the contexts of its providers while it lasts."""

    def __init__(self, root: ProvidesContexts, contexts: ByProvider) -> None:
        self.root = root
        self.contexts = contexts


class _Running(threading.local):
    """The innermost running call of this thread. A call starts and ends within one task."""

    def __init__(self) -> None:
        self.call: Call | None = None


class _Box:
    def __init__(self, value: ByProvider) -> None:
        self.value = value


class _Prepared(threading.local):
    """Contexts prepared by `set_context` for the next call of the current thread or async task."""

    _variable: ContextVar[_Box] = ContextVar("prepared")

    # torch.compile cannot trace ContextVar.get, but evaluates a property written in C as it is, anew for each call.
    # Before anything is prepared, `get` returns its argument, this object, whose own value is empty.
    _box = property(_variable.get)

    def __init__(self) -> None:
        self.value: ByProvider = {}

    def get(self) -> ByProvider:
        return self._box.value

    def set(self, value: ByProvider) -> None:
        if torch.compiler.is_compiling():
            self._box.value = value
        else:
            self._variable.set(_Box(value))  # A new box: tasks that inherited the old one see no change.


running = _Running()
_prepared = _Prepared()


class ContextProvider:
    """Contexts that one chain provides to its descendants, as the current thread or task sees them.

    Example:
        >>> model = fl.Chain(fl.UseContext("text", "embedding"))
        >>> model.provider.set_context("text", {"embedding": torch.ones(2)})
        >>> model.provider.get_context("text")
        {'embedding': tensor([1., 1.])}
    """

    def __init__(self, chain: ProvidesContexts) -> None:
        self._chain = weakref.ref(chain)

    @property
    def chain(self) -> ProvidesContexts | None:
        """The chain of these contexts, or None when it is gone."""
        return self._chain()

    @property
    def contexts(self) -> Contexts:
        """Contexts of this provider by name. Inside a call, changes to them last until the call ends."""
        chain = self.chain
        return {} if chain is None else self.during(call_of(chain))

    def during(self, call: Call | None) -> Contexts:
        """Contexts of this provider by name, during a call of its tree or, for None, before the next one."""
        chain = self.chain
        if chain is None:
            return {}
        if call is None:
            return chain.init_context() | _prepared.get().get(self, {})
        if self not in call.contexts:
            call.contexts[self] = chain.init_context()
        return call.contexts[self]

    def get_context(self, key: str) -> Context | None:
        """The nearest context of that name from this chain towards the root, or None."""
        node = self.chain
        call = None if node is None else call_of(node)
        while node is not None:
            context = node.provider.during(call).get(key)
            if context is not None:
                return context
            node = node.parent
        return None

    def set_context(self, key: str, value: Context) -> None:
        """Replace a context, for the running call, or before one for the next call of this thread or task.

        Raises:
            ContextError: The chain is gone.
        """
        self.update_contexts({key: value}, replace=True)

    def update_contexts(self, new_contexts: Contexts, replace: bool = False) -> None:
        """Update several contexts, or `replace` them: then entries that are not given are dropped.

        Raises:
            ContextError: The chain is gone.
        """
        chain = self.chain
        if chain is None:
            raise ContextError("The chain of this provider is gone, and nothing can read its contexts.")
        call = call_of(chain)
        contexts = self.during(call)
        for name, value in new_contexts.items():
            contexts[name] = dict(value) if replace else contexts.get(name, {}) | value
        if call is None:
            alive = {p: c for p, c in _prepared.get().items() if p.chain is not None}
            _prepared.set(alive | {self: contexts})

    def __repr__(self) -> str:
        return f"{type(self).__name__}(contexts={self.contexts!r})"


def call_of(chain: ProvidesContexts) -> Call | None:
    """The running call of this thread, if it is a call of this chain's tree."""
    call = running.call
    return call if call is not None and call.root is chain.root else None


def start_call(root: ProvidesContexts) -> Call:
    """A call of `root` that takes over the contexts prepared for it."""
    own: ByProvider = {}
    if prepared := _prepared.get():
        others: ByProvider = {}
        for provider, contexts in prepared.items():
            chain = provider.chain
            if chain is not None:
                (own if chain.root is root else others)[provider] = contexts
        if own:
            _prepared.set(others)
    return Call(root, own)
