"""The nodes of the tree: `Module`, its variant with a parent link, and its variant with a weight."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from inspect import Parameter, signature
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar, cast

import torch
from torch import Tensor, nn

from fluxion import notebook, shapes, tree
from fluxion.context import Context, ContextProvider
from fluxion.errors import ChainValueError

if TYPE_CHECKING:
    from fluxion.chain import Chain

M = TypeVar("M", bound=nn.Module)
BasicType = str | float | int | bool


class Module(nn.Module):
    """A `torch.nn.Module` that prints as a tree and knows its path."""

    _tag: ClassVar[str] = ""

    def __str__(self) -> str:
        attributes = self.basic_attributes(init_attrs_only=True)
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in attributes.items())})"

    def __repr__(self) -> str:
        return tree.render(self, depth=7)

    def pretty_print(self, depth: int = -1) -> None:
        """Print the tree below this module, `depth` levels of it, or all of it when `depth` is negative."""
        print(tree.render(self, depth=depth))  # noqa: T201

    def summary(self, *inputs: Any, depth: int = -1) -> str:
        """The tree below this module with the shapes of what each node returns for some inputs, as text.

        The model is called once, in eval mode and without gradients, and left as it was.

        Args:
            inputs: What to call the module with.
            depth: How many levels to show, or all of them when negative.

        Example:
            >>> print(fl.Chain(fl.Linear(3, 4), fl.ReLU()).summary(torch.ones(2, 3)))
            (CHAIN) → (2, 4)
                ├── Linear(in_features=3, out_features=4, device=cpu, dtype=float32) → (2, 4)
                └── ReLU() → (2, 4)
        """
        return tree.render(self, depth, shapes.note_of_call(self, *inputs))

    def _repr_html_(self) -> str:
        return notebook.render(self)

    def basic_attributes(self, init_attrs_only: bool = False) -> dict[str, BasicType | Sequence[BasicType]]:
        """Public attributes that are numbers, strings, booleans, or sequences of these.

        Args:
            init_attrs_only: Keep only constructor arguments whose value is not the default.
        """
        parameters = signature(type(self).__init__).parameters

        def is_default(key: str, value: object) -> bool:
            default = parameters[key].default
            # Torch keeps one number for all dimensions as a tuple that repeats it.
            repeated = isinstance(value, tuple) and len(value) > 0 and value == (default,) * len(value)
            return default is not Parameter.empty and (repeated or bool(value == default))

        return {
            key: value
            for key, value in vars(self).items()
            if not key.startswith("_")
            and _is_basic(value)
            and not (init_attrs_only and (key not in parameters or is_default(key, value)))
        }

    def get_path(self, parent: Chain | None = None, top: nn.Module | None = None) -> str:
        """Dotted path of this module from the root of its tree, which is named by its class.

        Args:
            parent: The chain that holds this module. Modules with a parent link do not need it.
            top: Stop at this ancestor instead of the root.

        Raises:
            ChainValueError: `parent` does not hold this module.
        """
        keys: list[str] = []
        node: nn.Module = self
        while parent is not None and node is not top:
            keys.append(parent.key_of(node))
            node, parent = parent, parent.parent
        return ".".join([type(node).__name__, *reversed(keys)])

    def _label(self) -> str:
        """The line of this module in the tree, after the tag."""
        return str(self)

    def _show_only_tag(self) -> bool:
        """Whether the tree prints the tag alone, without the class name and the attributes."""
        return False


class ContextModule(Module):
    """A module that knows the chain it is in, and through it reads the contexts of its ancestors.

    The link is weak: a child never keeps its root alive, and a copied or pickled subtree stands alone.
    """

    _parent: weakref.ref[Chain] | None
    _can_refresh_parent: bool
    _may_repeat: ClassVar[bool] = True  # Whether it may be used several times by its parent.

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.__dict__.update(_parent=None, _can_refresh_parent=True)  # Past nn.Module.__setattr__, which is slow.

    @property
    def parent(self) -> Chain | None:
        """The chain that holds this module, or None for a root."""
        link = self._parent
        return None if link is None else link()

    @property
    def ensure_parent(self) -> Chain:
        """The chain that holds this module.

        Raises:
            ChainValueError: The module is a root.
        """
        parent = self.parent
        if parent is None:
            raise ChainValueError(f"{type(self).__name__} has no parent: add it to a Chain first.")
        return parent

    def get_parents(self) -> list[Chain]:
        """The ancestors of this module, the nearest first."""
        parents: list[Chain] = []
        node = self.parent
        while node is not None:
            parents.append(node)
            node = node.parent
        return parents

    def _set_parent(self, parent: Chain | None) -> None:
        if self._can_refresh_parent:
            # Past nn.Module.__setattr__, which looks for parameters and modules in everything it is given.
            self.__dict__["_parent"] = None if parent is None else weakref.ref(parent)

    @contextlib.contextmanager
    def no_parent_refresh(self) -> Iterator[None]:
        """Within this block another chain may hold this module without becoming its parent."""
        before = self._can_refresh_parent
        self._can_refresh_parent = False
        try:
            yield
        finally:
            self._can_refresh_parent = before

    @property
    def provider(self) -> ContextProvider:
        """The context provider of the parent."""
        return self.ensure_parent.provider

    def use_context(self, context_name: str) -> Context:
        """The nearest context of that name, looked up from the parent towards the root.

        Raises:
            ContextError: No ancestor declares or was given that context.
        """
        return self.ensure_parent.use_context(context_name)

    def get_path(self, parent: Chain | None = None, top: nn.Module | None = None) -> str:
        return super().get_path(self.parent if parent is None else parent, top)

    def structural_copy(self) -> Self:
        """A copy that shares every parameter and buffer, and has no parent."""
        clone = shallow_copy(self)
        clone.__dict__.pop("_compiled_call_impl", None)  # It is bound to the original.
        clone.__dict__.update(_can_refresh_parent=True, _parent=None)
        return clone

    def __getstate__(self) -> dict[str, Any]:
        state = cast(dict[str, Any], super().__getstate__())  # type: ignore[no-untyped-call]
        return {**state, "_parent": None, "_can_refresh_parent": True}

    def __copy__(self) -> Self:
        return self.structural_copy()


class WeightedModule(Module):
    """A module with a `weight`."""

    weight: Tensor

    @property
    def device(self) -> torch.device:
        """The device of the weight."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weight."""
        return self.weight.dtype

    def __str__(self) -> str:
        line = super().__str__().removesuffix(")")
        separator = "" if line.endswith("(") else ", "
        return f"{line}{separator}device={self.device}, dtype={str(self.dtype).removeprefix('torch.')})"


class Late:
    """An attribute that is made when it is first asked for, and from then on is the object's own."""

    def __init__(self, make: Callable[[Any], Any], name: str = "") -> None:
        self._make, self._name = make, name

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return instance.__dict__.setdefault(self._name, self._make(instance))  # One object, whatever threads do.


# Most modules never have a hook, and torch gives each of them a dozen tables for hooks, most of its size and of the
# time to make it. A shallow copy of a Module has those that are empty when they are asked for.
_HOOK_TABLES: dict[str, Any] = {
    name: type(value)
    for name, value in vars(nn.Module()).items()
    if isinstance(value, (dict, set)) and name not in ("_parameters", "_buffers", "_modules")
}


def _empty(kind: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda module: kind()


for _name, _kind in _HOOK_TABLES.items():
    setattr(Module, _name, Late(_empty(_kind), _name))


class Template(Generic[M]):
    """Makes shallow copies of one module: what has to be copied is found once.

    A copy has the same parameters, buffers and children, and tables of its own for them and for hooks. One level of
    copying keeps what hooks, buffers and private attributes hold, and lets the two diverge.
    """

    def __init__(self, module: M) -> None:
        self._class = type(module)
        self._shared: dict[str, Any] = {}
        self._copied: list[tuple[str, Callable[[], Any]]] = []
        late = isinstance(module, Module)
        for name, value in vars(module).items():
            if not isinstance(value, (dict, set)):
                self._shared[name] = value
            elif value or not (late and name in _HOOK_TABLES):
                self._copied.append((name, value.copy))

    def copy(self) -> M:
        """A shallow copy of the module."""
        clone = self._class.__new__(self._class)
        self.fill(clone.__dict__)
        return clone

    def fill(self, state: dict[str, Any]) -> None:
        """Give the `__dict__` of another module the attributes that a shallow copy would have."""
        state.update(self._shared)
        for name, copied in self._copied:
            state[name] = copied()


def shallow_copy(module: M) -> M:
    """A copy with the same parameters, buffers and children, and with tables of its own for them and for hooks."""
    return Template(module).copy()


def _is_basic(value: object) -> bool:
    if isinstance(value, BasicType):
        return True
    return isinstance(value, Sequence) and all(isinstance(item, BasicType) for item in value)
