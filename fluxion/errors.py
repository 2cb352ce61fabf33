"""Errors raised by the tree, and the note that says where in the tree another error happened."""

from __future__ import annotations


class ChainError(RuntimeError):
    """Base of every error that the tree raises by itself.

    An error raised by a layer while a `Chain` runs keeps its own type and identity; the place in the tree is added
    to it once, as a note (`error.__notes__`), which tracebacks print.
    """


class ChainTypeError(ChainError, TypeError):
    """Something that is not of the kind the tree needs: not a module, not a predicate."""


class ChainValueError(ChainError, ValueError):
    """A module that cannot go where it was asked to go, or is not where it was looked for."""


class ChildNotFoundError(ChainError, KeyError, IndexError):
    """No child at that index, key or path, or none of that type."""

    # KeyError prints the repr of its argument; a sentence reads better as it is.
    __str__ = RuntimeError.__str__


class ContextError(ChainError, LookupError):
    """A context, or an entry of one, that is read or written and was never set."""
