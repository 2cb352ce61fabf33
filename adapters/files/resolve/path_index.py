"""`PathIndex`, the weights of a model or a checkpoint by their paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, Protocol, TypeVar

from torch import nn

from adapters.targets.target import Target, all_targets
from weights.disk.header import TensorInfo


class NamedWeight(Protocol):
    """A weight that a name in an adapter file can mean: a target of a model, or tensors of a checkpoint."""

    @property
    def path(self) -> str:
        """The dotted path: of the module for its `weight`, or else of the parameter."""

    @property
    def paths(self) -> Sequence[str]:
        """All paths, several where modules are shared."""

    @property
    def parameter(self) -> str:
        """The name of the parameter in its module."""

    @property
    def rows(self) -> int:
        """The number of outputs; 0 for a module without a weight."""


W = TypeVar("W", bound=NamedWeight)


@dataclass(frozen=True, eq=False)
class PathIndex(Generic[W]):
    """The weights that the names in an adapter file can mean, by path.

    Attributes:
        weights: In the order of the model.
        config: The settings of the model, which may say how large the heads of attention are.
        first_names: The first names in the paths of a checkpoint, which may be of a model with a head or without. Empty
            for a model in memory, whose paths are known.
    """

    weights: Sequence[W]
    config: object = None
    first_names: Sequence[str] = ()

    def by_path(self, flattened: bool) -> Mapping[str, Sequence[W]]:
        """Weights by path, with `_` in place of `.` if flattened: then several may have one path."""
        return self._flattened if flattened else self._dotted

    @cached_property
    def _dotted(self) -> Mapping[str, Sequence[W]]:
        return _grouped((path, weight) for weight in self.weights for path in weight.paths)

    @cached_property
    def _flattened(self) -> Mapping[str, Sequence[W]]:
        return _grouped((flat(path), weight) for weight in self.weights for path in weight.paths)


def _grouped(named: Iterator[tuple[str, W]]) -> Mapping[str, Sequence[W]]:
    found: dict[str, list[W]] = {}
    for path, weight in named:
        there = found.setdefault(path, [])
        if weight not in there:
            there.append(weight)
    return found


def flat(path: str) -> str:
    """A path with `_` in place of every `.`."""
    return path.replace(".", "_")


def model_index(model: nn.Module) -> PathIndex[Target]:
    """The path index of a model in memory."""
    return PathIndex(all_targets(model), getattr(model, "config", None))


@dataclass(frozen=True, eq=False)
class CheckpointWeight:
    """A weight of a checkpoint.

    Attributes:
        module: The path of its module.
        parameter: Its name there.
        shape: Its shape; None for a module without a `weight`.
    """

    module: str
    parameter: str
    shape: tuple[int, ...] | None

    @property
    def path(self) -> str:
        """The dotted path: of the module for its `weight`, or else of the parameter."""
        return self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"

    @property
    def paths(self) -> Sequence[str]:
        """The one path."""
        return (self.path,)

    @property
    def rows(self) -> int:
        """The number of outputs, as far as the shape shows it."""
        if not self.shape:
            return 0
        stacked = self.parameter != "weight" and len(self.shape) == 3  # (experts, outputs, inputs)
        return self.shape[1 if stacked else 0]


def checkpoint_index(tensors: Mapping[str, TensorInfo], config: object = None) -> PathIndex[CheckpointWeight]:
    """The path index of a checkpoint, given the header entries of its tensors by name."""
    modules: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if module:
            modules.setdefault(module, {})[parameter] = tensor.shape
    found = [
        CheckpointWeight(module, parameter, shapes.get(parameter))
        for module, shapes in modules.items()
        for parameter in dict.fromkeys(("weight", *shapes))
    ]
    return PathIndex(found, config, tuple(dict.fromkeys(name.partition(".")[0] for name in tensors)))
