"""`Adapter`, the mixin of a chain that takes the place of a module and keeps that module inside."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterable, Iterator
from typing import Any, ClassVar, Generic, Self, TypeVar, cast

from torch import nn

import fluxion as fl
from adapters.errors import PatchStateError, TargetError

T = TypeVar("T", bound=nn.Module)
M = TypeVar("M", bound=nn.Module)
Slot = tuple[nn.Module, str]
"""A slot of a model: a parent module, and the key of one of its children."""


class WeakSlots:
    """Slots with weak references to their modules. A copy or a pickle is empty: a copied model has other slots."""

    __slots__ = ("_slots",)

    def __init__(self, slots: Iterable[Slot] = ()) -> None:
        self._slots = [(weakref.ref(parent), key) for parent, key in slots]

    def __iter__(self) -> Iterator[Slot]:
        for ref, key in self._slots:
            if (parent := ref()) is not None:
                yield parent, key

    def __reduce__(self) -> tuple[type[WeakSlots], tuple[()]]:
        return WeakSlots, ()


class Adapter(Generic[T]):
    """Mixin for chains that adapt a target.

    Example:
        >>> class Scaled(fl.Chain, adapters.Adapter[fl.Linear]):
        ...     def __init__(self, target: fl.Linear) -> None:
        ...         with self.setup_adapter(target):
        ...             super().__init__(target, fl.Multiply(2.0))
        >>> adapter = Scaled(model.Linear_1).inject(model)
        >>> adapter.eject()
    """

    _highlight: ClassVar[bool] = True  # In pictures of the tree.
    _target: list[T]  # In a list, so that torch does not take it for a child.
    _outside: WeakSlots  # Where this adapter was put.

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not issubclass(cls, fl.Chain):
            raise TypeError(f"The adapter {cls.__name__} must be a chain: class {cls.__name__}(fl.Chain, Adapter[T]).")

    @property
    def target(self) -> T:
        """The adapted module."""
        return self._target[0]

    @contextlib.contextmanager
    def setup_adapter(self, target: T) -> Iterator[None]:
        """A block in which the constructor of the chain is called: it may hold the target, which stays where it is."""
        self.__dict__.update(_target=[target], _outside=WeakSlots())
        with target.no_parent_refresh() if isinstance(target, fl.ContextModule) else contextlib.nullcontext():
            yield

    @property
    def slots(self) -> list[Slot]:
        """The slots of this adapter: each module that holds it, and its key there. Empty when it is ejected."""
        node, known = cast(fl.Chain, self), list(self._outside)
        slots = [(parent, key) for parent, key in known if parent._modules.get(key) is node]
        if not slots and (chain := node.parent) is not None:  # It was moved.
            slots = [(chain, chain.key_of(node))]
        if len(slots) != len(known) or slots != known:
            self.__dict__["_outside"] = WeakSlots(slots)
        return slots

    def inject(self, parent: nn.Module | None = None) -> Self:
        """Take the place of the target in all of its slots below `parent`.

        Args:
            parent: A module that holds the target, at any depth; by default the parent of the target, if it is a
                module that knows its parent, such as a Chain.

        Raises:
            PatchStateError: The adapter is injected already.
            TargetError: The target has no parent, or is not below the one given.
        """
        if parent is None and isinstance(self.target, fl.ContextModule):
            parent = self.target.parent
        if parent is None:
            raise TargetError(f"{type(self.target).__name__} does not know its parent: pass it to inject(parent).")
        slots = find_slots(parent, self.target)
        if not slots:
            raise TargetError(f"{type(self.target).__name__} is not below {type(parent).__name__}: pass its parent.")
        if self.slots:
            raise PatchStateError(f"{type(self).__name__} is injected already: eject it first.")
        self._occupy(slots, WeakSlots(slots))
        return self

    def _occupy(self, slots: list[Slot], same: WeakSlots) -> None:
        """Fill the slots of the target with this adapter."""
        node = cast(fl.Chain, self)
        self.__dict__["_outside"] = same
        fill_slots(slots, node)
        if isinstance(self.target, fl.ContextModule):
            link_parent(self.target, find_slots(node, self.target))

    def eject(self) -> None:
        """Give the slots back to the target, or to the adapters that were injected around the target since.

        Raises:
            PatchStateError: The adapter is not injected.
        """
        slots = self.slots
        if not slots:
            raise PatchStateError(f"{type(self).__name__} is not injected.")
        self._vacate(slots)

    def _vacate(self, slots: list[Slot]) -> None:
        """Give all slots of this adapter to the heir."""
        node = cast(fl.Chain, self)
        heir = self._heir()
        if heir is not self.target:  # The adapter keeps its own target, to be injected again.
            fill_slots(find_slots(node, heir), self.target, link=False)
        fill_slots(slots, heir)
        if isinstance(heir, Adapter):
            heir._outside = WeakSlots(slots)
        for parent, _ in slots:
            for holder in (parent, *(parent.get_parents() if isinstance(parent, fl.ContextModule) else ())):
                if isinstance(holder, Adapter) and holder.target is node:
                    holder._target = [heir]
        self.__dict__["_outside"] = WeakSlots()
        node._set_parent(None)

    def _heir(self) -> nn.Module:
        """The module that takes the slots: the target, with the adapters that were injected below this one."""
        top, heir = cast(fl.Chain, self), cast(nn.Module, self.target)
        for parent, _ in find_slots(top, self.target):
            node: fl.ContextModule | None = parent if isinstance(parent, fl.Chain) else None
            while node is not None and node is not top:
                if isinstance(node, Adapter):
                    heir = node
                node = node.parent
        return heir

    def _base_children(self) -> Collection[nn.Module | None]:
        """The children that belong to the base model: all of them, as an adapter written by hand is a part of it."""
        return cast(fl.Chain, self)._modules.values()

    def _pre_structural_copy(self) -> None:
        if isinstance(self.target, fl.Chain):
            raise PatchStateError(
                f"{type(self).__name__} adapts a Chain, which a structural copy would share: eject it first."
            )

    def _post_structural_copy(self, source: Adapter[T]) -> None:
        self._target, self._outside = [source.target], WeakSlots()


def base_modules(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model in order, each once, with adapted layers. Subtrees that patches added are not entered."""
    seen: set[int] = set()
    stack = [model]
    while stack:
        module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        yield module
        if module._modules:
            children = module._modules.values()
            below = module._base_children() if isinstance(module, Adapter) else children
            stack += reversed([child for child in below if child is not None])


def find_slots(root: nn.Module, module: nn.Module) -> list[Slot]:
    """The slots of a module below `root`."""
    return find_all_slots(root, [module])[module]


def find_all_slots(root: nn.Module, modules: Collection[M]) -> dict[M, list[Slot]]:
    """The slots of each of some modules below `root`, found in one walk."""
    found: dict[M, list[Slot]] = {module: [] for module in modules}
    parents = dict.fromkeys(parent for _, parent in fl.walk(root, lambda child, _: child in found, recurse=True))
    for parent in parents:
        for key, child in parent._modules.items():
            if child in found:
                found[child].append((parent, key))
    return found


def fill_slots(slots: list[Slot], module: nn.Module, link: bool = True) -> None:
    """Put a module into slots of parents of any kind."""
    for parent, key in slots:
        if isinstance(parent, fl.Chain):
            parent._swap(key, module)
        else:
            parent._modules[key] = module
    if link:
        link_parent(module, slots)


def link_parent(module: nn.Module, slots: list[Slot]) -> None:
    """Make the first chain among the slots the parent of a module that knows its parent."""
    if isinstance(module, fl.ContextModule):
        module._set_parent(next((parent for parent, _ in slots if isinstance(parent, fl.Chain)), None))
