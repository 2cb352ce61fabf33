"""The tree: `Chain`, and its mutation. Every change is checked before it is made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Self, cast, overload

from torch import nn

from fluxion.calls import Caller
from fluxion.context import ContextProvider
from fluxion.copying import lazy_attribute
from fluxion.errors import ChainTypeError, ChainValueError
from fluxion.keys import new_key, release_key
from fluxion.links import Container, ContextModule, short
from fluxion.module import Module
from fluxion.walk import walk


class Chain(Caller):
    """Modules called in order, each with the output of the one before; a tuple becomes several inputs.

    Children are any `torch.nn.Module`, kept in order under keys made of their class name, numbered when it is
    repeated: `Linear_1`, `Linear_2`. A child keeps its key until it leaves, whatever happens to its siblings. A chain
    sits in one chain at most; a leaf may be used in several places.

    Example:
        >>> chain = fl.Chain(fl.Linear(32, 64), fl.ReLU(), fl.Linear(64, 10))
        >>> chain(torch.ones(8, 32)).shape
        torch.Size([8, 10])
        >>> chain.Linear_2 is chain[2]
        True
    """

    _tag = "CHAIN"
    _tag_only: ClassVar[bool] = True  # It prints as its tag. Not inherited: a subclass prints its name too.
    _may_repeat = False

    _suffixes = lazy_attribute(lambda chain: {})  # Last number given in a key, by class name.

    def __init__(self, *args: nn.Module | Iterable[nn.Module]) -> None:
        """
        Args:
            args: The children, or one iterable of them.

        Raises:
            ChainTypeError: A child is not a module.
            ChainValueError: A child already has a parent, or a chain is given twice.
        """
        super().__init__()
        self.__dict__["_provider"] = ContextProvider(self)  # Now: a compiled call would recompile for a new attribute.
        modules = _as_modules(args)
        self._check(modules, holders=())  # Nothing can hold this chain yet.
        self._insert_all(0, modules)

    @overload
    def __getitem__(self, key: int | str) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...
    def __getitem__(self, key: int | str | slice) -> Any:
        """A child by index or key, or for a slice a structural copy with these children only.

        Raises:
            ChildNotFoundError: There is no such child.
        """
        if not isinstance(key, slice):
            return self._modules[self._key(key)]
        copy = self.structural_copy()
        names = list(self._modules)
        kept = dict.fromkeys(names[key])
        for name in reversed(names):
            if name not in kept:
                copy._take(name)
        copy._modules = {name: copy._modules[name] for name in kept}
        return copy

    def __setitem__(self, key: int | str, module: nn.Module) -> None:
        """Replace a child by index or key; the new child takes over its key. See `replace`."""
        self._put(self._key(key), module)

    def __delitem__(self, key: int | str) -> None:
        self._take(self._key(key))

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module):
            if name not in self.__dict__.get("_modules", ()):
                raise ChainValueError(
                    f"{name!r} is not a child of this {type(self).__name__}: add modules with append() or insert(), or"
                    " keep a module that is not a child in a list."
                )
            self[name] = value
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in self._modules:
            del self[name]
        else:
            super().__delattr__(name)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Append a module under a custom key, or replace the child that has it. Raises as `insert` does."""
        if name in self._modules:
            self[name] = cast(nn.Module, module)
            return
        self._check([module], [self, *self.get_parents()])
        super().add_module(name, module)
        _link(module, self)

    # Mutation

    def insert(self, index: int, module: nn.Module) -> None:
        """Insert a module before the child at an index, as `list.insert` does.

        Raises:
            ChainTypeError: It is not a module.
            ChainValueError: It is a chain that already has a parent, this chain itself, or an ancestor of it.
        """
        self._check([module], [self, *self.get_parents()])
        self._insert_all(index, [module])

    def append(self, module: nn.Module) -> None:
        """Add a module at the end. Raises as `insert` does."""
        self.insert(len(self._modules), module)

    def extend(self, modules: Iterable[nn.Module]) -> None:
        """Add modules at the end, all or none. Raises as `insert` does."""
        modules = list(modules)
        self._check(modules, [self, *self.get_parents()])
        self._insert_all(len(self._modules), modules)

    def insert_before_type(self, module_type: type[nn.Module], new_module: nn.Module) -> None:
        """Insert a module before the first child of a type.

        Raises:
            ChainValueError: No child has that type, or the module cannot be inserted.
        """
        self.insert(self._index_of_type(module_type), new_module)

    def insert_after_type(self, module_type: type[nn.Module], new_module: nn.Module) -> None:
        """Insert a module after the first child of a type.

        Raises:
            ChainValueError: No child has that type, or the module cannot be inserted.
        """
        self.insert(self._index_of_type(module_type) + 1, new_module)

    def pop(self, index: int = -1) -> Any:
        """Remove the child at an index and return it.

        Raises:
            ChildNotFoundError: The index is out of range. It is an `IndexError`.
        """
        return self._take(self._key(index))

    def remove(self, module: nn.Module) -> None:
        """Remove a child, its first use if it has several.

        Raises:
            ChainValueError: It is not a child of this chain.
        """
        self._take(self.key_of(module))

    def replace(self, old_module: nn.Module, new_module: nn.Module, old_module_parent: Chain | None = None) -> None:
        """Replace a child by another module, which takes over its key. Constant time on average.

        Args:
            old_module: The child, its first use if it has several: `chain[index] = new` names another use.
            new_module: The module that takes its place.
            old_module_parent: The chain that holds the old module from now on.

        Raises:
            ChainTypeError: The new module is not a module.
            ChainValueError: The old module is not a child, the new one cannot be inserted, or `old_module_parent` does
                not hold the old module.
        """
        if old_module_parent is not None and old_module not in old_module_parent:
            raise ChainValueError(f"{short(old_module)} is not a child of {old_module_parent.get_path()}.")
        self._put(self.key_of(old_module), new_module, old_module_parent)

    def structural_copy(self) -> Self:
        """Copy of the tree in which chains are new and leaves, with their parameters, are shared.

        Training flags, hooks, buffers and private attributes are kept. `_pre_structural_copy()` is called on every
        chain that defines it before it is copied, and `_post_structural_copy(source)` on its copy.
        """
        if hasattr(type(self), "_pre_structural_copy"):  # Asking an instance takes longer.
            self._pre_structural_copy()
        clone = super().structural_copy()
        for name in ("_provider", "_key_hints"):
            clone.__dict__.pop(name, None)
        copies: dict[int, nn.Module] = {}  # A leaf used twice is one leaf in the copy too.
        for name, child in self._modules.items():
            if isinstance(child, ContextModule):
                if id(child) not in copies:
                    copies[id(child)] = child.structural_copy()
                clone._modules[name] = child = copies[id(child)]
                _link(child, clone)
        if hasattr(type(self), "_post_structural_copy"):
            clone._post_structural_copy(self)
        return clone

    def _index_of_type(self, module_type: type[nn.Module]) -> int:
        for index, child in enumerate(self):
            if isinstance(child, module_type):
                return index
        raise ChainValueError(f"There is no {module_type.__name__} among the children of {self.get_path()}.")

    def _check(self, modules: Sequence[object], holders: Sequence[Container]) -> None:
        """Raise if a module cannot become a child, or holds one of `holders`: this chain and its ancestors."""
        ancestors = set(map(id, holders))
        chains: set[int] = set()
        for module in modules:
            if not isinstance(module, nn.Module):
                raise ChainTypeError(f"A Chain holds torch.nn.Module objects, not {module!r}.")
            if id(module) in ancestors:
                raise ChainValueError(f"{short(module)} cannot be put inside itself.")
            if module._modules and ancestors and any(id(inner) in ancestors for inner, _ in walk(module, recurse=True)):
                raise ChainValueError(f"{short(module)} holds this chain, and cannot be put inside it.")
            if not isinstance(module, ContextModule):
                continue
            parent = module.parent
            if id(module) in chains:
                raise ChainValueError(f"{short(module)} is given twice: use structural_copy() for the second use.")
            if not module._may_repeat:
                chains.add(id(module))
            elif parent is self:
                continue  # A leaf may be used twice by one parent.
            if parent is not None and module._can_refresh_parent:
                raise ChainValueError(
                    f"{short(module)} is already in {parent.get_path()}: remove it from there, or use"
                    " structural_copy()."
                )

    def _insert_all(self, index: int, modules: Sequence[nn.Module]) -> None:
        before = len(self._modules)
        repeated = Counter(type(module).__name__ for module in modules) if len(modules) > 1 else {}
        suffixes, hints = self._suffixes, self._key_hints
        for module in modules:
            name = type(module).__name__
            key = new_key(self._modules, suffixes, name, numbered=repeated.get(name, 0) > 1)
            self._modules[key] = module
            if hints:
                hints.setdefault(id(module), key)
            _link(module, self)
        index = max(0, index + before) if index < 0 else index
        if index < before:
            children = list(self._modules.items())
            self._modules = dict(children[:index] + children[before:] + children[index:before])
            hints.clear()

    def _put(self, key: str, module: nn.Module, old_module_parent: Chain | None = None) -> None:
        if module is not self._modules[key]:
            self._check([module], [self, *self.get_parents()])
            old = self._swap(key, module)
            _link(module, self)
            self._unlink(old, old_module_parent)

    def _swap(self, key: str, module: nn.Module) -> nn.Module:
        """Put a module in a slot and return the old one, without checks, and with parent links as they are."""
        old, self._modules[key] = self._modules[key], module
        hints: dict[int, str] = self._key_hints
        hints.pop(id(old), None)
        if hints and hints.setdefault(id(module), key) != key:
            hints.clear()  # A second use: `key_of` finds out which one is first.
        return old

    def _take(self, key: str) -> nn.Module:
        module = self._modules.pop(key)
        self._key_hints.pop(id(module), None)
        release_key(self._suffixes, key, type(module).__name__)
        self._unlink(module, None)
        return module

    def _unlink(self, module: nn.Module, parent: Chain | None) -> None:
        """Give a removed child another parent, or none, unless this chain still holds it or is not its parent."""
        if not isinstance(module, ContextModule) or module.parent is not self:
            return
        if not (module._may_repeat and any(child is module for child in self)):
            module._set_parent(parent)

    def __str__(self) -> str:
        return repr(self)

    def _label(self) -> str:
        return Module.__str__(self) if type(self).__str__ is Chain.__str__ else str(self)

    def _show_only_tag(self) -> bool:
        return bool(vars(type(self)).get("_tag_only"))

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_provider", "_key_hints")
        return {name: value for name, value in super().__getstate__().items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for child in self:
            _link(child, self)


def _as_modules(args: tuple[Any, ...]) -> list[nn.Module]:
    if len(args) != 1 or not isinstance(args[0], Iterable):
        return list(args)
    is_child = isinstance(args[0], nn.Module) and not isinstance(args[0], nn.ModuleList)
    return list(args) if is_child else list(args[0])


def _link(module: object, parent: Chain) -> None:
    if isinstance(module, ContextModule):
        module._set_parent(parent)
