"""Values that travel through the tree beside the inputs.

A chain that overrides `init_context` provides contexts to everything below it. A node looks a context up from its
parent towards the root at the moment it needs it. What is read and written belongs to one call of the root: it starts
from `init_context`, plus what `set_context` prepared for that call in the same thread or task, and is dropped when the
call ends, by an exception too.
"""

from __future__ import annotations

import threading
import weakref
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch

from fluxion.errors import ContextError

if TYPE_CHECKING:
    from fluxion.chain import Chain

Context = dict[str, Any]
Contexts = dict[str, Context]
Prepared = dict["ContextProvider", Contexts]


class Call:
    """One running call of a root: what its providers hold for as long as it lasts."""

    def __init__(self, root: Chain, contexts: Prepared) -> None:
        self.root = root
        self.contexts = contexts


class _Running(threading.local):
    """The innermost call that is running in this thread. A call runs from start to end within one task."""

    def __init__(self) -> None:
        self.call: Call | None = None


class _Box:
    def __init__(self, value: Prepared) -> None:
        self.value = value


class _Prepared(threading.local):
    """What `set_context` prepared for the next call, as the current thread or async task sees it."""

    _variable: ContextVar[_Box] = ContextVar("prepared")

    # torch.compile cannot trace ContextVar.get, but it evaluates a property written in C as it is, for each call anew.
    # Where nothing was prepared yet, `get` returns its argument, this object: it has a value for that case.
    _box = property(_variable.get)

    def __init__(self) -> None:
        self.value: Prepared = {}

    def get(self) -> Prepared:
        return self._box.value

    def set(self, value: Prepared) -> None:
        if torch.compiler.is_compiling():
            self._box.value = value
        else:
            self._variable.set(_Box(value))  # A new box, so that tasks that inherited the old one see no change.


running = _Running()
_prepared = _Prepared()


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
        chain = self.chain
        return {} if chain is None else self.during(call_of(chain))

    def during(self, call: Call | None) -> Contexts:
        """All contexts of this provider during a call of its tree, or before one."""
        chain = self.chain
        if chain is None:
            return {}
        if call is None:
            return chain.init_context() | _prepared.get().get(self, {})
        if self not in call.contexts:
            call.contexts[self] = chain.init_context()
        return call.contexts[self]

    def get_context(self, key: str) -> Context | None:
        """The nearest context of that name, looked up from this chain towards the root, or None."""
        node = self.chain
        call = None if node is None else call_of(node)
        while node is not None:
            context = node.provider.during(call).get(key)
            if context is not None:
                return context
            node = node.parent
        return None

    def set_context(self, key: str, value: Context) -> None:
        """Set a context, for the running call or else for the next one of this thread or task."""
        self.update_contexts({key: value}, replace=True)

    def update_contexts(self, new_contexts: Contexts, replace: bool = False) -> None:
        """Set several contexts. Entries of a context that is there already are kept unless `replace`.

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


def call_of(chain: Chain) -> Call | None:
    """The call that is running in this thread, if it is one of the tree of this chain."""
    call = running.call
    return call if call is not None and call.root is chain.root else None


def start_call(root: Chain) -> Call:
    """A call of `root` with contexts of its own: those that were prepared for it."""
    own: Prepared = {}
    if prepared := _prepared.get():
        others: Prepared = {}
        for provider, contexts in prepared.items():
            chain = provider.chain
            if chain is not None:
                (own if chain.root is root else others)[provider] = contexts
        if own:
            _prepared.set(others)
    return Call(root, own)
