"""Walk of a tree of modules, for chains and for any other `torch.nn.Module`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar, get_origin, overload

from torch import nn

from fluxion.errors import ChainTypeError

T = TypeVar("T", bound=nn.Module)
Predicate = Callable[[Any, Any], bool]


@overload
def walk(
    root: nn.Module, predicate: Predicate | None = None, recurse: bool = False
) -> Iterator[tuple[nn.Module, nn.Module]]: ...
@overload
def walk(root: nn.Module, predicate: type[T], recurse: bool = False) -> Iterator[tuple[T, nn.Module]]: ...
@overload
def walk(
    root: nn.Module, predicate: tuple[type[nn.Module], ...], recurse: bool = False
) -> Iterator[tuple[nn.Module, nn.Module]]: ...
def walk(root: nn.Module, predicate: Any = None, recurse: bool = False) -> Iterator[tuple[Any, Any]]:
    """Yield `(module, parent)` for every match below `root`, parents before children, in order.

    A module in several slots is yielded once for each. The tree may be changed while it is walked: the children of a
    module are listed when the walk enters it.

    Args:
        root: Any module. It is not itself a candidate.
        predicate: A type, a tuple of types, or `f(module, parent) -> bool`. Raising `StopIteration` in `f` prunes
            that module and everything below it. None matches everything.
        recurse: Also enter matches.

    Raises:
        ChainTypeError: The predicate is none of these; a subscripted generic has no instances.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU())
        >>> [(layer.out_features, parent is model) for layer, parent in fl.walk(model, torch.nn.Linear)]
        [(2, True)]
    """
    matches = _as_function(predicate)
    # A stack instead of recursion: linear in the size of the tree, and without a limit on its depth.
    stack = [_children(root)]
    while stack:
        for module, parent in stack[-1]:
            try:
                found = matches(module, parent)
            except StopIteration:
                continue
            if found:
                yield module, parent
            if (recurse or not found) and module._modules:
                stack.append(_children(module))
                break
        else:
            stack.pop()


def _children(parent: nn.Module) -> Iterator[tuple[nn.Module, nn.Module]]:
    return iter([(child, parent) for child in parent._modules.values() if child is not None])


def _as_function(predicate: object) -> Predicate:
    if predicate is None:
        return lambda module, parent: True
    if isinstance(predicate, (type, tuple)) and get_origin(predicate) is None:
        types = predicate if isinstance(predicate, tuple) else (predicate,)
        if types and all(isinstance(item, type) for item in types):
            return lambda module, parent: isinstance(module, types)
    elif callable(predicate) and get_origin(predicate) is None:
        return predicate
    raise ChainTypeError(
        f"{predicate!r} cannot be used to select modules: pass a type, a tuple of types, or f(module, parent) -> bool."
    )
