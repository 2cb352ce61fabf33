"""The catalogue of methods: every class with a `key` in the modules of a package, found at first use."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar

import torch
from torch import nn

import weights
from adapters.errors import AdapterError
from adapters.methods.core.method import Method

M = TypeVar("M", bound=type[Method])


@dataclass(frozen=True)
class Description:
    """What there is to know of a method.

    Attributes:
        name: The class.
        key: Its name in files.
        about: What it is, in a sentence.
        paper: Where it comes from.
        formula: What becomes of the weight `W`.
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
    """Methods by their keys in files. It prints as a table, in a notebook too.

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
        if not self._is_complete:
            for module in pkgutil.iter_modules(self._folders):
                if not module.ispkg:
                    found = vars(import_module(f"{self._package}.{module.name}"))
                    for value in [*found.values()]:
                        if (
                            isinstance(value, type)
                            and value.__module__.endswith(f".{module.name}")
                            and "key" in vars(value)
                        ):
                            self.register(value)
            self._is_complete = True
        return self._methods

    def register(self, method: M) -> M:
        """Add a method of your own under its `key`, so that files that have it load. To be used as a decorator.

        Raises:
            AdapterError: Another method has that key.
        """
        if self._methods.get(method.key, method) is not method:
            raise AdapterError(
                f"The key {method.key!r} is that of {self._methods[method.key].__name__}: choose another."
            )
        self._methods[method.key] = method
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
                tuple(method.adapts or (name for name, sample in samples.items() if _can_adapt(method, *sample))),
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
    """A stack of matrices that is no layer's weight."""

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


def _can_adapt(method: type[Method], layer: nn.Module, parameter: str) -> bool:
    # What kinds of layers a method can adapt does not depend on its numbers.
    return object.__new__(method).matrix(layer, parameter) is not None
