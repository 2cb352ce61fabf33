"""Modules that print as a tree: `Module`, and `WeightedModule` for one with a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from fluxion.copying import lazy_attribute
from fluxion.printing import notebook, shapes, tree

BasicType = str | float | int | bool


class Holder(Protocol):
    """A module that holds others under keys: all that is needed of a chain here."""

    @property
    def parent(self) -> Holder | None: ...
    def key_of(self, module: nn.Module) -> str: ...


class Module(nn.Module):
    """A `torch.nn.Module` that prints as a tree and knows its path.

    Example:
        >>> class Scale(fl.Module):
        ...     def __init__(self, factor: float) -> None:
        ...         super().__init__()
        ...         self.factor = factor
        >>> Scale(factor=2.0)
        Scale(factor=2.0)
    """

    _tag: ClassVar[str] = ""
    _lazy_tables: ClassVar[frozenset[str]] = frozenset()  # Filled below.

    def __str__(self) -> str:
        attributes = self.basic_attributes(init_attrs_only=True)
        return f"{type(self).__name__}({', '.join(f'{key}={value}' for key, value in attributes.items())})"

    def __repr__(self) -> str:
        return tree.render(self, depth=7)

    def pretty_print(self, depth: int = -1) -> None:
        """Print the tree below this module, `depth` levels of it, or all of it when `depth` is negative."""
        print(tree.render(self, depth=depth))  # noqa: T201

    def summary(self, *inputs: Any, depth: int = -1) -> str:
        """Text of the tree below this module, with the output shapes of each node for some inputs.

        The model is called once, in eval mode and without gradients, and left as it was.

        Args:
            inputs: Inputs to call the module with.
            depth: Number of levels to show, or all of them when negative.

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

    def get_path(self, parent: Holder | None = None, top: nn.Module | None = None) -> str:
        """Dotted path of this module from the root of its tree, which is named by its class.

        Args:
            parent: The chain that holds this module. Modules with a parent link do not need it.
            top: Ancestor to start the path at, instead of the root.

        Raises:
            ChainValueError: `parent` does not hold this module.
        """
        keys: list[str] = []
        node: Any = self
        while parent is not None and node is not top:
            keys.append(parent.key_of(node))
            node, parent = parent, parent.parent
        return ".".join([type(node).__name__, *reversed(keys)])

    def _label(self) -> str:
        """Line of this module in the tree, after the tag."""
        return str(self)

    def _show_only_tag(self) -> bool:
        """True when the tree prints the tag alone, without the class name and the attributes."""
        return False


# Torch gives each module a dozen tables for hooks, most of its size and of the time to make it, and few modules have
# hooks. A shallow copy of a Module makes its empty tables when they are first read.
def _empty(kind: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda module: kind()


for _name, _value in vars(nn.Module()).items():
    if isinstance(_value, (dict, set)) and _name not in ("_parameters", "_buffers", "_modules"):
        setattr(Module, _name, lazy_attribute(_empty(type(_value)), _name))
        Module._lazy_tables |= {_name}


class WeightedModule(Module):
    """A module with a `weight`, whose device and dtype it prints.

    Example:
        >>> issubclass(fl.Linear, fl.WeightedModule)
        True
        >>> fl.Linear(3, 4, bias=False, dtype=torch.float16)
        Linear(in_features=3, out_features=4, device=cpu, dtype=float16)
    """

    weight: Tensor

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self.weight.dtype

    def __str__(self) -> str:
        line = super().__str__().removesuffix(")")
        separator = "" if line.endswith("(") else ", "
        return f"{line}{separator}device={self.device}, dtype={str(self.dtype).removeprefix('torch.')})"


def _is_basic(value: object) -> bool:
    if isinstance(value, BasicType):
        return True
    return isinstance(value, Sequence) and all(isinstance(item, BasicType) for item in value)
