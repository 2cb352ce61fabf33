"""Links of the tree: `ContextModule` knows the chain it is in, `Container` knows its children by key."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self, TypeVar, cast, overload

import torch
from torch import nn

from fluxion.context import Context, ContextProvider, Contexts
from fluxion.copying import lazy_attribute, shallow_copy
from fluxion.errors import ChainTypeError, ChainValueError, ChildNotFoundError, ContextError
from fluxion.keys import find_key, key_at
from fluxion.module import Holder, Module
from fluxion.walk import Predicate, walk

T = TypeVar("T", bound=nn.Module)


class ContextModule(Module):
    """A module that knows the chain it is in, and through it reads the contexts of its ancestors.

    The link is weak: a child never keeps its root alive, and a copied or pickled subtree stands alone.

    Example:
        >>> class Path(fl.ContextModule):
        ...     def forward(self, x: int) -> str:
        ...         return self.get_path()
        >>> fl.Chain(fl.Parallel(fl.Identity(), Path()))(1)
        (1, 'Chain.Parallel.Path')
    """

    _parent: weakref.ref[Container] | None
    _can_refresh_parent: bool
    _may_repeat: ClassVar[bool] = True  # A parent may hold it under several keys.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__.update(_parent=None, _can_refresh_parent=True)  # Past nn.Module.__setattr__, which is slow.

    @property
    def parent(self) -> Container | None:
        """The chain that holds this module, or None for a root."""
        link = self._parent
        return None if link is None else link()

    @property
    def ensure_parent(self) -> Container:
        """The chain that holds this module.

        Raises:
            ChainValueError: The module is a root.
        """
        parent = self.parent
        if parent is None:
            raise ChainValueError(f"{type(self).__name__} has no parent: add it to a Chain first.")
        return parent

    def get_parents(self) -> list[Container]:
        """Ancestors of this module, the nearest first."""
        parents: list[Container] = []
        node = self.parent
        while node is not None:
            parents.append(node)
            node = node.parent
        return parents

    def _set_parent(self, parent: Container | None) -> None:
        if self._can_refresh_parent:
            # Past nn.Module.__setattr__, which looks for parameters and modules in everything it is given.
            self.__dict__["_parent"] = None if parent is None else weakref.ref(parent)

    @contextlib.contextmanager
    def no_parent_refresh(self) -> Iterator[None]:
        """Let another chain hold this module without becoming its parent, within the block."""
        before = self._can_refresh_parent
        self._can_refresh_parent = False
        try:
            yield
        finally:
            self._can_refresh_parent = before

    @property
    def provider(self) -> ContextProvider:
        """Context provider of the parent."""
        return self.ensure_parent.provider

    def use_context(self, context_name: str) -> Context:
        """The nearest context of that name, looked up from the parent towards the root.

        Raises:
            ContextError: No ancestor declares or was given that context.
        """
        return self.ensure_parent.use_context(context_name)

    def get_path(self, parent: Holder | None = None, top: nn.Module | None = None) -> str:
        return super().get_path(self.parent if parent is None else parent, top)

    def structural_copy(self) -> Self:
        """Copy that shares every parameter and buffer, and has no parent."""
        clone = shallow_copy(self)
        clone.__dict__.pop("_compiled_call_impl", None)  # It is bound to the original.
        clone.__dict__.update(_can_refresh_parent=True, _parent=None)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        state = cast(dict[str, Any], super().__getstate__())  # type: ignore[no-untyped-call]
        return {**state, "_parent": None, "_can_refresh_parent": True}

    def __copy__(self) -> Self:
        return self.structural_copy()


class Container(ContextModule):
    """The part of a `Chain` that reads: children by key, by path and by type, and contexts.

    Every parent is a `Chain`; this class is what the modules in one rely on.
    """

    _modules: dict[str, nn.Module]  # type: ignore[assignment]

    _provider = lazy_attribute(ContextProvider)
    _key_hints = lazy_attribute(lambda chain: {})  # Key by the id of a child; verified before it is trusted.

    # Contexts

    def init_context(self) -> Contexts:
        """Contexts that this chain provides, as they are at the start of a call. Override it to provide some."""
        return {}

    @property
    def provider(self) -> ContextProvider:
        """Context provider of this chain itself."""
        return cast(ContextProvider, self._provider)

    def set_context(self, context: str, value: Context) -> None:
        """Set a context of this chain, for the running call or else for the next one of this thread or task."""
        self.provider.set_context(context, value)

    def use_context(self, context_name: str) -> Context:
        """The nearest context of that name, looked up from this chain towards the root.

        Raises:
            ContextError: No chain on the way declares or was given that context.
        """
        context = self.provider.get_context(context_name)
        if context is not None:
            return context
        raise ContextError(
            f"Context {context_name!r} is not set above {self.get_path()}: declare it in init_context(), or call"
            " set_context() on an ancestor, in the thread or task that makes the call."
        )

    # Children

    @property
    def root(self) -> Container:
        """The topmost chain above this one, or itself."""
        node = self
        while (parent := node.parent) is not None:
            node = parent
        return node

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" in self.__dict__ and (key := find_key(self._modules, name)) is not None:
                return self._modules[key]
            raise

    def key_of(self, module: nn.Module) -> str:
        """Key of a child, the first one if it has several. Constant time on average.

        Raises:
            ChainValueError: It is not a child of this chain.
        """
        hints: dict[int, str] = self._key_hints
        key = hints.get(id(module))
        if key is not None and self._modules.get(key) is module:
            return key
        # Hints are rebuilt on a miss. Reversed: the first use wins.
        self.__dict__["_key_hints"] = hints = {id(child): name for name, child in reversed(self._modules.items())}
        if id(module) not in hints:
            raise ChainValueError(f"{short(module)} is not a child of {self.get_path()}.")
        return hints[id(module)]

    def _key(self, key: int | str) -> str:
        """Key of a child from a key or an index.

        Raises:
            ChildNotFoundError: There is no such child.
        """
        found = find_key(self._modules, key) if isinstance(key, str) else key_at(self._modules, key)
        if found is None:
            have = f"its children are {', '.join(self._modules)}" if self._modules else "it has no children"
            raise ChildNotFoundError(f"{type(self).__name__} has no child {key!r}: {have}.")
        return found

    def layer(self, key: str | int | Sequence[str | int], layer_type: type[T] = nn.Module) -> T:  # type: ignore[assignment]
        """The module at a key, an index, or a path of these, checked to be of a type.

        Example:
            >>> chain = fl.Chain(fl.Chain(fl.Linear(2, 2), fl.ReLU()))
            >>> chain.layer(("Chain", 1), fl.ReLU)
            ReLU()

        Raises:
            ChildNotFoundError: There is no module at that path.
            ChainTypeError: The module there is not a `layer_type`.
        """
        node: nn.Module = self
        for step in (key,) if isinstance(key, (str, int)) else key:
            if isinstance(node, Container):
                node = node._modules[node._key(step)]
            elif str(step) in node._modules:
                node = cast(nn.Module, node._modules[str(step)])
            else:
                raise ChildNotFoundError(f"{short(node)} has no child {step!r} on the way to {key!r}.")
        if not isinstance(node, layer_type):
            raise ChainTypeError(f"The layer at {key!r} is a {type(node).__name__}, not a {layer_type.__name__}.")
        return node

    # Search

    @overload
    def walk(
        self, predicate: Predicate | None = None, recurse: bool = False
    ) -> Iterator[tuple[nn.Module, Container]]: ...
    @overload
    def walk(self, predicate: type[T], recurse: bool = False) -> Iterator[tuple[T, Container]]: ...
    @overload
    def walk(
        self, predicate: tuple[type[nn.Module], ...], recurse: bool = False
    ) -> Iterator[tuple[nn.Module, Container]]: ...
    def walk(self, predicate: Any = None, recurse: bool = False) -> Iterator[tuple[Any, Any]]:
        """`fluxion.walk` from this chain: every match below it, with the module that holds it."""
        return walk(self, predicate, recurse)

    def layers(self, layer_type: type[T], recurse: bool = False) -> Iterator[T]:
        """Every module of a type below this chain, in order. Matches are not entered unless `recurse`."""
        return (module for module, _ in walk(self, layer_type, recurse))

    def find(self, layer_type: type[T]) -> T | None:
        """The first module of a type below this chain, or None."""
        return next(self.layers(layer_type), None)

    def ensure_find(self, layer_type: type[T]) -> T:
        """The first module of a type below this chain.

        Raises:
            ChildNotFoundError: There is none.
        """
        found = self.find(layer_type)
        if found is None:
            raise ChildNotFoundError(f"There is no {layer_type.__name__} in {self.get_path()}.")
        return found

    def find_parent(self, module: nn.Module) -> Container | None:
        """The module below this chain, or this chain, that holds the given one; None when nothing does."""
        if module in self:
            return self
        return next((parent for _, parent in self.walk(lambda child, _: child is module)), None)

    def ensure_find_parent(self, module: nn.Module) -> Container:
        """The module below this chain, or this chain, that holds the given one.

        Raises:
            ChildNotFoundError: Nothing does.
        """
        parent = self.find_parent(module)
        if parent is None:
            raise ChildNotFoundError(f"{short(module)} is not in {self.get_path()}.")
        return parent

    @property
    def device(self) -> torch.device | None:
        """Device of the first parameter, or None without parameters."""
        parameter = next(self.parameters(), None)
        return None if parameter is None else parameter.device

    @property
    def dtype(self) -> torch.dtype | None:
        """Dtype of the first parameter, or None without parameters."""
        parameter = next(self.parameters(), None)
        return None if parameter is None else parameter.dtype


def short(module: object) -> str:
    """Class and address of a module, for error messages."""
    return f"{type(module).__name__} (at {id(module):#x})"
