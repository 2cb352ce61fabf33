"""Errors of the tree, each with a call that raises it."""

from __future__ import annotations


class ChainError(RuntimeError):
    """Base of every error that the tree raises by itself.

    An error raised by a layer while a `Chain` runs keeps its type and identity; its path in the tree is added to it
    once, as a note (`error.__notes__`), which tracebacks print.

    Example:
        >>> try:
        ...     fl.Chain(fl.Linear(2, 2))(torch.ones(1, 3))
        ... except RuntimeError as error:
        ...     print(error.__notes__[0].splitlines()[0])
        Chain.Linear failed on (Tensor(shape=(1, 3), dtype=float32, device=cpu))
    """


class ChainTypeError(ChainError, TypeError):
    """An object of the wrong type: not a module, not a predicate, not the layer type asked for.

    Example:
        >>> try:
        ...     fl.Chain(torch.relu)
        ... except fl.ChainTypeError as error:
        ...     print(error)
        A Chain holds torch.nn.Module objects, not <built-in method relu of type object at 0x...>.
    """


class ChainValueError(ChainError, ValueError):
    """A module that cannot be inserted, a module that is not a child, or inputs that a layer cannot take.

    Example:
        >>> inner = fl.Chain(fl.ReLU())
        >>> outer = fl.Chain(inner)
        >>> try:
        ...     fl.Chain(inner)
        ... except fl.ChainValueError as error:
        ...     print(error)
        Chain (at 0x...) is already in Chain: remove it from there, or use structural_copy().
    """


class ChildNotFoundError(ChainError, KeyError, IndexError):
    """No child at an index, a key or a path, or none of a type.

    Example:
        >>> try:
        ...     fl.Chain(fl.Linear(2, 2), fl.ReLU())["Conv2d"]
        ... except fl.ChildNotFoundError as error:
        ...     print(error)
        Chain has no child 'Conv2d': its children are Linear, ReLU.
    """

    # KeyError prints the repr of its argument; a sentence reads better as it is.
    __str__ = RuntimeError.__str__


class ContextError(ChainError, LookupError):
    """A context, or an entry of one, that is read or written and was never set.

    Example:
        >>> try:
        ...     fl.Chain(fl.UseContext("text", "embedding"))()
        ... except fl.ContextError as error:
        ...     print(error)
        Context 'text' is not set above Chain: declare it in init_context(), or call set_context() on an ancestor, in
        the thread or task that makes the call.
    """
