"""The catalogue of methods: every class with a `key` in the modules of a package, found at first use."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import TypeVar

import torch
from torch import nn

import weights
from adapters.errors import AdapterError
from adapters.methods.core.method import Method

M = TypeVar("M", bound=type[Method])


@dataclass(frozen=True)
class Description:
    """The facts of a method.

    Attributes:
        name: The class.
        key: Its name in files.
        about: A sentence about it.
        paper: Its source.
        formula: The weight with a branch merged, in terms of the weight `W`.
        layers: The kinds of layers it can adapt.
        merges: Whether it can be merged into the weights.
        files: The formats that can hold it.
    """

    name: str
    key: str
    about: str
    paper: str
    formula: str
    layers: tuple[str, ...]
    merges: bool
    files: tuple[str, ...]


class Catalogue(Mapping[str, type[Method]]):
    """Methods by their keys in files, printed as a table, in a notebook too.

    Example:
        >>> print(adapters.METHODS)
        >>> adapters.METHODS["lora"](rank=8)
    """

    def __init__(self, package: str, folders: Iterable[str]) -> None:
        self._package = package
        self._folders = [*folders]
        self._methods: dict[str, type[Method]] = {}
        self._is_complete = False

    def _all(self) -> dict[str, type[Method]]:
        """The methods, those of the package imported first."""
        if not self._is_complete:
            for info in pkgutil.iter_modules(self._folders):
                if not info.ispkg:
                    self._add_methods_of(import_module(f"{self._package}.{info.name}"))
            self._is_complete = True
        return self._methods

    def _add_methods_of(self, module: ModuleType) -> None:
        for value in [*vars(module).values()]:
            if isinstance(value, type) and value.__module__ == module.__name__ and "key" in vars(value):
                self._methods[vars(value)["key"]] = value

    def register(self, method: M) -> M:
        """Add a method under its `key`, so that files that name it load. To be used as a decorator.

        A class that is declared again, as by a cell of a notebook that runs again, replaces the former one.

        Raises:
            AdapterError: It has no key, or another method has that key.

        Example:
            >>> @adapters.register
            ... class Mine(adapters.LoRA):
            ...     key = "mine"
        """
        key = getattr(method, "key", "")
        if not key:
            raise AdapterError(f'{method.__name__} has no key: give it one, as in key = "mine".')
        other = self._all().get(key, method)
        if (other.__module__, other.__qualname__) != (method.__module__, method.__qualname__):
            raise AdapterError(f"The key {key!r} is that of {other.__name__}: choose another.")
        self._methods[key] = method
        return method

    def forget(self, key: str) -> None:
        """Take a registered method out again.

        Raises:
            KeyError: No method has that key.
        """
        del self._methods[key]

    def __getitem__(self, key: str) -> type[Method]:
        return self._all()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())

    def describe(self) -> list[Description]:
        """The facts of every method, in alphabetical order of the classes."""
        samples = _samples()
        return [
            Description(
                method.__name__,
                key,
                (method.__doc__ or "").strip().partition("\n")[0],
                method.paper,
                method.formula,
                (method.whole_model,) if method.whole_model else _kinds(method, samples),
                method.mergeable,
                weights.formats_of(method.stored_as or key),
            )
            for key, method in sorted(self.items(), key=lambda item: item[1].__name__.lower())
        ]

    def __repr__(self) -> str:
        rows = [("method", "paper", "formula", "layers")]
        rows += [(one.name, one.paper, one.formula, ", ".join(one.layers)) for one in self.describe()]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
        return "\n".join(line.rstrip() for line in lines)

    def _repr_markdown_(self) -> str:
        lines = ["| Method | Paper | Weight `W` becomes | Layers | Merges | Files |", "|---|---|---|---|---|---|"]
        for one in self.describe():
            layers, files = ", ".join(one.layers), ", ".join(one.files) or "–"
            paper = one.paper.replace("arXiv:", "https://arxiv.org/abs/")
            paper = f"[{one.paper}]({paper})" if paper != one.paper else paper
            merges = "yes" if one.merges else "no"
            lines.append(f"| `{one.name}` | {paper} | `{one.formula}` | {layers} | {merges} | {files} |")
        return "\n".join(lines) + "\n"


class _Experts(nn.Module):
    """A stack of matrices, as layers of experts hold them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight_stack = nn.Parameter(torch.empty(2, 3, 4))


def _samples() -> dict[str, tuple[nn.Module, str]]:
    """A layer of each kind, without memory, and the parameter to adapt."""
    with torch.device("meta"):
        return {
            "linear": (nn.Linear(4, 4), "weight"),
            "convolution": (nn.Conv2d(4, 4, 3), "weight"),
            "embedding": (nn.Embedding(4, 4), "weight"),
            "experts": (_Experts(), "weight_stack"),
            "normalisation": (nn.LayerNorm(4), "weight"),
            "bias": (nn.Linear(4, 4), "bias"),
        }


def _kinds(method: type[Method], samples: dict[str, tuple[nn.Module, str]]) -> tuple[str, ...]:
    """The kinds of layers that a method adapts, which do not depend on its hyperparameters."""
    blank = object.__new__(method)
    return tuple(kind for kind, sample in samples.items() if blank.matrix(*sample) is not None)
