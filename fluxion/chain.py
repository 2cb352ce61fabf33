"""The tree itself: `Chain`, and its combinators, which say how the outputs of the children become one output."""

from __future__ import annotations

import functools
import inspect
import operator
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, repeat
from typing import Any, Self, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from fluxion.context import Context, ContextProvider, Contexts, running, start_call
from fluxion.errors import ChainTypeError, ChainValueError, ChildNotFoundError, ContextError
from fluxion.location import locate
from fluxion.module import ContextModule, Late, Module
from fluxion.walk import Predicate, walk

T = TypeVar("T", bound=nn.Module)

_MODULE_CALL = nn.Module.__call__
GLOBAL_HOOKS = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_backward_pre_hooks,
    nn.modules.module._global_backward_hooks,
)


class Chain(ContextModule):
    """Modules called one after the other, each with the output of the one before; a tuple becomes several inputs.

    Children are kept in order under keys made of their class name, with a suffix when it is repeated: `Linear_1`,
    `Linear_2`. A key given to a child stays with its place until the child leaves, whatever happens to its siblings.
    Children are any `torch.nn.Module`. A chain sits in one chain at most; a leaf may be used in several places.

    Example:
        >>> chain = Chain(Linear(32, 64), ReLU(), Linear(64, 10))
        >>> chain.Linear_2 is chain[2]
        True
    """

    _modules: dict[str, nn.Module]  # type: ignore[assignment]
    _tag = "CHAIN"
    _may_repeat = False

    _provider = Late(ContextProvider)
    _suffixes = Late(lambda chain: {})  # By class name, the last number that a key was given.
    _places = Late(lambda chain: {})  # By the id of a child, its key: a hint.

    def __init__(self, *args: nn.Module | Iterable[nn.Module]) -> None:
        """
        Args:
            args: The children, or one iterable of them.

        Raises:
            ChainTypeError: A child is not a module.
            ChainValueError: A child already has a parent, or a chain is given twice.
        """
        super().__init__()
        self.__dict__["_provider"] = ContextProvider(self)  # A compiled call would see one come.
        modules = _as_modules(args)
        self._check(modules, holders=())  # Nothing can hold this chain yet.
        self._insert_all(0, modules)

    # Running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        root, outer = self.root, running.call
        if self is not root and outer is not None and outer.root is root:
            return super().__call__(*args, **kwargs)
        running.call = start_call(root)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            running.call = outer

    def forward(self, *args: Any) -> Any:
        key, output = "", args[0] if len(args) == 1 else args
        try:
            for key, layer in self._modules.items():  # noqa: B007
                output = entry(layer)(*args)
                args = output if isinstance(output, tuple) else (output,)
        except Exception as error:
            if not torch.compiler.is_compiling():  # Dynamo cannot trace it, and runs a call that raises again without.
                locate(error, self, key, args)
            raise
        return output

    def _call_each(self, inputs: Iterable[tuple[Any, ...]]) -> list[Any]:
        """The output of every child for inputs of its own."""
        outputs: list[Any] = []
        key, args = "", ()
        try:
            for (key, layer), args in zip(self._modules.items(), inputs):  # noqa: B007, B905
                outputs.append(entry(layer)(*args))
        except Exception as error:
            if not torch.compiler.is_compiling():  # Dynamo cannot trace it, and runs a call that raises again without.
                locate(error, self, key, args)
            raise
        return outputs

    # Context

    def init_context(self) -> Contexts:
        """The contexts this chain provides, as they are at the start of a call. Override it to provide some."""
        return {}

    @property
    def provider(self) -> ContextProvider:
        """The contexts of this chain itself."""
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

    # Reading

    @property
    def root(self) -> Chain:
        """The topmost chain above this one, or itself."""
        node = self
        while (parent := node.parent) is not None:
            node = parent
        return node

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self._modules.values())

    def __len__(self) -> int:
        return len(self._modules)

    @overload
    def __getitem__(self, key: int | str) -> Any: ...
    @overload
    def __getitem__(self, key: slice) -> Self: ...
    def __getitem__(self, key: int | str | slice) -> Any:
        """A child by index or key, or for a slice a structural copy that holds these children only.

        Raises:
            ChildNotFoundError: There is no such child.
        """
        if isinstance(key, slice):
            copy = self.structural_copy()
            names = list(self._modules)
            kept = dict.fromkeys(names[key])
            for name in reversed(names):
                if name not in kept:
                    copy._take(name)
            copy._modules = {name: copy._modules[name] for name in kept}
            return copy
        return self._modules[self._key(key)]

    def __setitem__(self, key: int | str, module: nn.Module) -> None:
        """Put a module in the place of a child, under the child's key. See `replace`."""
        self._put(self._key(key), module)

    def __delitem__(self, key: int | str) -> None:
        self._take(self._key(key))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_modules" in self.__dict__ and (key := self._find_key(name)) is not None:
                return self._modules[key]
            raise

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
        """Append a module under a key of your own, or replace the child that has it."""
        if name in self._modules:
            self[name] = cast(nn.Module, module)
            return
        self._check([module], [self, *self.get_parents()])
        super().add_module(name, module)
        _link(module, self)

    def key_of(self, module: nn.Module) -> str:
        """The key of a child, the first one if it is used several times. Constant time on average.

        Raises:
            ChainValueError: It is not a child of this chain.
        """
        places: dict[int, str] = self._places
        key = places.get(id(module))
        if key is not None and self._modules.get(key) is module:
            return key
        # The index is a hint: rebuilt when it misses, and never trusted without a look. Reversed: first use wins.
        self.__dict__["_places"] = places = {id(child): name for name, child in reversed(self._modules.items())}
        if id(module) not in places:
            raise ChainValueError(f"{_short(module)} is not a child of {self.get_path()}.")
        return places[id(module)]

    def layer(self, key: str | int | Sequence[str | int], layer_type: type[T] = nn.Module) -> T:  # type: ignore[assignment]
        """The module at a key, an index, or a path of these, checked to be of a type.

        Example:
            >>> chain.layer(("Block", 0, "Linear_2"), fl.Linear)

        Raises:
            ChildNotFoundError: There is nothing there.
            ChainTypeError: What is there is not a `layer_type`.
        """
        node: nn.Module = self
        for step in (key,) if isinstance(key, (str, int)) else key:
            if isinstance(node, Chain):
                node = node[step]
            elif str(step) in node._modules:
                node = cast(nn.Module, node._modules[str(step)])
            else:
                raise ChildNotFoundError(f"{_short(node)} has no child {step!r} on the way to {key!r}.")
        if not isinstance(node, layer_type):
            raise ChainTypeError(f"The layer at {key!r} is a {type(node).__name__}, not a {layer_type.__name__}.")
        return node

    @overload
    def walk(self, predicate: Predicate | None = None, recurse: bool = False) -> Iterator[tuple[nn.Module, Chain]]: ...
    @overload
    def walk(self, predicate: type[T], recurse: bool = False) -> Iterator[tuple[T, Chain]]: ...
    @overload
    def walk(
        self, predicate: tuple[type[nn.Module], ...], recurse: bool = False
    ) -> Iterator[tuple[nn.Module, Chain]]: ...
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

    def find_parent(self, module: nn.Module) -> Chain | None:
        """The module below this chain, or this chain, that holds the given one; None when nothing does."""
        if module in self:
            return self
        return next((parent for _, parent in self.walk(lambda child, _: child is module)), None)

    def ensure_find_parent(self, module: nn.Module) -> Chain:
        """The module below this chain, or this chain, that holds the given one.

        Raises:
            ChildNotFoundError: Nothing does.
        """
        parent = self.find_parent(module)
        if parent is None:
            raise ChildNotFoundError(f"{_short(module)} is not in {self.get_path()}.")
        return parent

    @property
    def device(self) -> torch.device | None:
        """The device of the first parameter, or None without parameters."""
        parameter = next(self.parameters(), None)
        return None if parameter is None else parameter.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the first parameter, or None without parameters."""
        parameter = next(self.parameters(), None)
        return None if parameter is None else parameter.dtype

    # Changing. Everything is checked before anything changes.

    def insert(self, index: int, module: nn.Module) -> None:
        """Insert a module before the child at an index, which counts as in `list.insert`.

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
        """Put a module in the place of a child, under the child's key. Constant time on average.

        Args:
            old_module: The child, its first use if it has several: `chain[index] = new` names another use.
            new_module: What takes its place.
            old_module_parent: The chain that holds the old module from now on.

        Raises:
            ChainTypeError: The new module is not a module.
            ChainValueError: The old module is not a child, the new one cannot be inserted, or `old_module_parent` does
                not hold the old module.
        """
        if old_module_parent is not None and old_module not in old_module_parent:
            raise ChainValueError(f"{_short(old_module)} is not a child of {old_module_parent.get_path()}.")
        self._put(self.key_of(old_module), new_module, old_module_parent)

    def structural_copy(self) -> Self:
        """A copy of the tree in which chains are new and leaves, so parameters, are shared.

        Training flags, hooks, buffers and private attributes are kept. `_pre_structural_copy()` is called on every
        chain that defines it before it is copied, and `_post_structural_copy(source)` on its copy.
        """
        if hasattr(type(self), "_pre_structural_copy"):  # Looked for in the class: asking an instance takes longer.
            self._pre_structural_copy()
        clone = super().structural_copy()
        for name in ("_provider", "_places"):
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

    # The tools of the above

    def _key(self, key: int | str) -> str:
        if isinstance(key, str):
            found = self._find_key(key)
        else:
            count = len(self._modules)
            position = key + count if key < 0 else key
            ordered = reversed(self._modules) if position > count // 2 else iter(self._modules)
            position = count - 1 - position if position > count // 2 else position
            found = next(islice(ordered, position, None), None) if 0 <= position < count else None
        if found is None:
            have = f"its children are {', '.join(self._modules)}" if self._modules else "it has no children"
            raise ChildNotFoundError(f"{type(self).__name__} has no child {key!r}: {have}.")
        return found

    def _find_key(self, name: str) -> str | None:
        """A key as it is, or else read as a position: `Linear_2` is the second Linear, `Linear` the only one.

        Keys never change, so after insertions and removals the two may differ. The key itself goes first.
        """
        if name in self._modules:
            return name
        class_name, _, number = name.rpartition("_")
        if not number.isdecimal():
            class_name, number = name, ""
        keys = [key for key, child in self._modules.items() if type(child).__name__ == class_name]
        if number:
            return keys[int(number) - 1] if 1 <= int(number) <= len(keys) else None
        return keys[0] if len(keys) == 1 else None

    def _index_of_type(self, module_type: type[nn.Module]) -> int:
        for index, child in enumerate(self):
            if isinstance(child, module_type):
                return index
        raise ChainValueError(f"There is no {module_type.__name__} among the children of {self.get_path()}.")

    def _new_key(self, class_name: str, numbered: bool) -> str:
        """A key that is free: the class name, or the class name with the next number."""
        suffixes: dict[str, int] = self._suffixes
        number = suffixes.get(class_name, 0) + 1
        key = f"{class_name}_{number}" if numbered or number > 1 else class_name
        while key in self._modules:
            number += 1
            key = f"{class_name}_{number}"
        suffixes[class_name] = number
        return key

    def _check(self, modules: Sequence[object], holders: Sequence[Chain]) -> None:
        """Raise if one of these cannot become a child, or holds one of `holders`: this chain and its ancestors."""
        ancestors = set(map(id, holders))
        chains: set[int] = set()
        for module in modules:
            if not isinstance(module, nn.Module):
                raise ChainTypeError(f"A Chain holds torch.nn.Module objects, not {module!r}.")
            if id(module) in ancestors:
                raise ChainValueError(f"{_short(module)} cannot be put inside itself.")
            if module._modules and ancestors and any(id(inner) in ancestors for inner, _ in walk(module, recurse=True)):
                raise ChainValueError(f"{_short(module)} holds this chain, and cannot be put inside it.")
            if not isinstance(module, ContextModule):
                continue
            parent = module.parent
            if id(module) in chains:
                raise ChainValueError(f"{_short(module)} is given twice: use structural_copy() for the second use.")
            if not module._may_repeat:
                chains.add(id(module))
            elif parent is self:
                continue  # A leaf may be used twice by one parent.
            if parent is not None and module._can_refresh_parent:
                raise ChainValueError(
                    f"{_short(module)} is already in {parent.get_path()}: remove it from there, or use"
                    " structural_copy()."
                )

    def _insert_all(self, index: int, modules: Sequence[nn.Module]) -> None:
        before = len(self._modules)
        repeated = Counter(type(module).__name__ for module in modules) if len(modules) > 1 else {}
        places: dict[int, str] = self._places
        for module in modules:
            name = type(module).__name__
            key = self._new_key(name, numbered=repeated.get(name, 0) > 1)
            self._modules[key] = module
            if places:
                places.setdefault(id(module), key)
            _link(module, self)
        index = max(0, index + before) if index < 0 else index
        if index < before:
            children = list(self._modules.items())
            self._modules = dict(children[:index] + children[before:] + children[index:before])
            places.clear()

    def _put(self, key: str, module: nn.Module, old_module_parent: Chain | None = None) -> None:
        if module is not self._modules[key]:
            self._check([module], [self, *self.get_parents()])
            old = self._swap(key, module)
            _link(module, self)
            self._unlink(old, old_module_parent)

    def _swap(self, key: str, module: nn.Module) -> nn.Module:
        """Put a module in a slot and return the old one, without checks and without touching parent links."""
        old, self._modules[key] = self._modules[key], module
        places: dict[int, str] = self._places
        places.pop(id(old), None)
        if places and places.setdefault(id(module), key) != key:
            places.clear()  # Used twice: which use comes first is found out when it is asked for.
        return old

    def _take(self, key: str) -> nn.Module:
        module = self._modules.pop(key)
        self._places.pop(id(module), None)
        suffixes: dict[str, int] = self._suffixes
        name = type(module).__name__
        number = suffixes.get(name, 0)
        if key == f"{name}_{number}" or (key == name and number == 1):
            suffixes[name] = number - 1  # The last number given is free again.
        self._unlink(module, None)
        return module

    def _unlink(self, module: nn.Module, parent: Chain | None) -> None:
        """Give a module that left another parent, or none, unless it is still here or never was ours."""
        if not isinstance(module, ContextModule) or module.parent is not self:
            return
        if not (module._may_repeat and any(child is module for child in self)):
            module._set_parent(parent)

    def __str__(self) -> str:
        return repr(self)

    def _label(self) -> str:
        return Module.__str__(self) if type(self).__str__ is Chain.__str__ else str(self)

    def _show_only_tag(self) -> bool:
        return type(self) in _TAG_ONLY

    def __getstate__(self) -> dict[str, Any]:
        left_out = ("_provider", "_places")
        return {name: value for name, value in super().__getstate__().items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for child in self:
            _link(child, self)


class Parallel(Chain):
    """Every child with the same inputs; the outputs as a tuple."""

    _tag = "PAR"

    def forward(self, *args: Any) -> tuple[Any, ...]:
        return tuple(self._call_each(repeat(args)))


class Distribute(Chain):
    """The first child with the first input, the second with the second, and so on; the outputs as a tuple."""

    _tag = "DISTR"

    def forward(self, *args: Any) -> tuple[Any, ...]:
        if len(args) != len(self):
            raise ChainValueError(f"{self.get_path()} has {len(self)} children but was given {len(args)} inputs.")
        return tuple(self._call_each((arg,) for arg in args))


class Passthrough(Chain):
    """The children one after the other, for their effects; the inputs as they came."""

    _tag = "PASS"

    def forward(self, *args: Any) -> Any:
        super().forward(*args)
        return args[0] if len(args) == 1 else args


class Sum(Chain):
    """Every child with the same inputs; the sum of the outputs, each first summed itself when it is a tuple."""

    _tag = "SUM"

    def forward(self, *args: Any) -> Any:
        if not self._modules:
            raise ChainValueError(f"{self.get_path()} has nothing to add: give it a child.")
        outputs = self._call_each(repeat(args))
        return _add(_add(output) if isinstance(output, tuple) else output for output in outputs)


class Residual(Chain):
    """The children one after the other; their output plus the input."""

    _tag = "RES"

    def forward(self, *args: Any) -> Any:
        if len(args) != 1:
            raise ChainValueError(f"{self.get_path()} adds its one input to its output, but was given {len(args)}.")
        return super().forward(*args) + args[0]


class Concatenate(Chain):
    """Every child with the same inputs; the outputs that are not None, concatenated along `dim`."""

    _tag = "CAT"

    def __init__(self, *modules: nn.Module | Iterable[nn.Module], dim: int = 0) -> None:
        super().__init__(*modules)
        self.dim = dim

    def forward(self, *args: Any) -> Tensor:
        return torch.cat([output for output in self._call_each(repeat(args)) if output is not None], dim=self.dim)


class Matmul(Chain):
    """Two children with the same inputs; the matrix product of their outputs."""

    _tag = "MATMUL"

    def __init__(self, input: nn.Module, other: nn.Module) -> None:
        super().__init__(input, other)

    def forward(self, *args: Any) -> Tensor:
        left, right = self._call_each(repeat(args))
        return torch.matmul(left, right)


_TAG_ONLY = frozenset({Chain, Parallel, Distribute, Passthrough, Sum, Concatenate})


class Lambda(Module):
    """Any function as a leaf."""

    def __init__(self, func: Callable[..., Any]) -> None:
        super().__init__()
        self.func = func

    def forward(self, *args: Any) -> Any:
        return self.func(*args)

    def __str__(self) -> str:
        name = getattr(self.func, "__name__", type(self.func).__name__)
        try:
            return f"Lambda({name}{inspect.signature(self.func)})"
        except (TypeError, ValueError):  # Some functions written in C have no signature.
            return f"Lambda({name})"


class UseContext(ContextModule):
    """An entry of a context as a leaf. Inputs are ignored.

    Example:
        >>> UseContext("unet", "residuals").compose(lambda residuals: residuals.pop())
    """

    def __init__(self, context: str, key: str) -> None:
        super().__init__()
        self.context = context
        self.key = key
        self.func: Callable[[Any], Any] | None = None

    def forward(self, *args: Any) -> Any:
        value = self.use_context(self.context).get(self.key)
        if value is None:
            raise ContextError(
                f"Context entry {self.context!r}.{self.key!r} is not set: set it with SetContext or set_context()."
            )
        return value if self.func is None else self.func(value)

    def compose(self, func: Callable[[Any], Any]) -> Self:
        """Pass what is read through a function. Returns this module."""
        self.func = func
        return self


class SetContext(ContextModule):
    """Writes its input to an entry of a context, and returns it.

    With a callback, calls `callback(value, input)` with the entry's value instead of replacing it.

    Raises:
        ContextError: No ancestor provides that context.
    """

    def __init__(self, context: str, key: str, callback: Callable[[Any, Any], Any] | None = None) -> None:
        super().__init__()
        self.context = context
        self.key = key
        self.callback = callback

    def forward(self, x: Any) -> Any:
        context = self.use_context(self.context)
        if self.callback is None:
            context[self.key] = x
        elif self.key in context:
            self.callback(context[self.key], x)
        else:
            raise ContextError(f"Context entry {self.context!r}.{self.key!r} is not set: give it a value first.")
        return x


def entry(layer: nn.Module) -> Callable[..., Any]:
    """The shortest callable that does what calling the layer does.

    Without hooks `torch.nn.Module.__call__` comes down to `forward`. Calling that directly takes one frame per level
    of the tree instead of three, which is faster and lets trees be hundreds of levels deep.
    """
    state = layer.__dict__
    if (
        state.get("_forward_pre_hooks")
        or state.get("_forward_hooks")
        or state.get("_backward_pre_hooks")
        or state.get("_backward_hooks")
        or any(GLOBAL_HOOKS)
        or layer._compiled_call_impl is not None
        or type(layer).__call__ not in PLAIN_CALLS
        or torch.compiler.is_compiling()
    ):
        return layer
    return layer.forward


PLAIN_CALLS = {_MODULE_CALL, Chain.__call__}  # A class whose own call does no more than run may join.


def structural_copy(module: T) -> T:
    """`module.structural_copy()` for what has a parent link; anything else is a leaf and stays itself."""
    return module.structural_copy() if isinstance(module, ContextModule) else module


def _as_modules(args: tuple[Any, ...]) -> list[nn.Module]:
    if len(args) != 1 or not isinstance(args[0], Iterable):
        return list(args)
    is_child = isinstance(args[0], nn.Module) and not isinstance(args[0], nn.ModuleList)
    return list(args) if is_child else list(args[0])


def _link(module: object, parent: Chain) -> None:
    if isinstance(module, ContextModule):
        module._set_parent(parent)


def _add(terms: Iterable[Any]) -> Any:
    """The sum of some terms, without the zero that `sum` starts from."""
    return functools.reduce(operator.add, terms)


def _short(module: object) -> str:
    return f"{type(module).__name__} (at {id(module):#x})"
