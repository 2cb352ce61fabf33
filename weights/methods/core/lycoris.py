"""The layout of a method in LyCORIS's files: the ends of its tensors' names, and the hyperparameters they imply."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache

import torch
from torch import Tensor

from weights.adapter_file import Hyperparameter, LayerWeights
from weights.discovery import stated

Tensors = Mapping[str, Tensor]
Read = tuple[dict[str, Hyperparameter], dict[str, Tensor]]
Reader = Callable[[Tensors, float | None], Read]
Written = tuple[dict[str, Tensor], float | None]


@dataclass(frozen=True)
class LycorisLayout:
    """One layout of a method in LyCORIS's files; a method may have several.

    Attributes:
        method: The key of the method.
        sets: The tensors that a layer may have together.
        read: Returns the hyperparameters and the tensors, from the tensors of a file and its alpha, None where it has
            none. Raises a ValueError that states the problem.
        write: The reverse, None for a layout that only other programs write. Raises a ValueError that states what the
            format has no place for.
        names: The end of a tensor's name in the file, where it is another.
        spellings: Other ends of a tensor's name that are read, by the end in LyCORIS's spelling.
        bias: For a tensor, the end of the name of the tensor that does the same to the bias of the layer.
        has_alpha: Whether a layer may have an alpha.
        vectors: Tensors that may have a single dimension.
        integers: Tensors of integers.
        holds: Whether it is for these tensors, of all that have their names.
    """

    method: str
    sets: Collection[frozenset[str]]
    read: Reader
    write: Callable[[LayerWeights], Written] | None
    names: Mapping[str, str] = field(default_factory=dict)
    spellings: Mapping[str, Collection[str]] = field(default_factory=dict)
    bias: Mapping[str, str] = field(default_factory=dict)
    has_alpha: bool = True
    vectors: frozenset[str] = frozenset()
    integers: frozenset[str] = frozenset()
    holds: Callable[[Tensors], bool] = lambda tensors: True

    @cached_property
    def ends(self) -> dict[str, str]:
        """The name of a tensor by the end of its name in a file."""
        return {self.end(name): name for names in self.sets for name in names}

    def end(self, name: str) -> str:
        """The end of a tensor's name in a file."""
        return self.names.get(name, name)

    def named(self, found: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        """The tensors of a layer by their own names, from the ends of a file; None where they are of another layout."""
        if not found.keys() <= self.ends.keys():
            return None
        tensors = {self.ends[end]: found[end] for end in sorted(found)}
        return tensors if self.fits(tensors) else None

    def fits(self, tensors: Tensors) -> bool:
        """Whether a layer of these tensors has this layout."""
        return frozenset(tensors) in self.sets and self.holds(tensors)

    def check(self, tensors: Tensors) -> None:
        """Raise a ValueError for a tensor that no method can have, by its shape or dtype."""
        for name, tensor in tensors.items():
            least = 1 if name in self.vectors else 2
            if self.has_alpha and (tensor.ndim < least or not tensor.numel()):
                raise ValueError(f"a tensor that is no matrix, {self.end(name)} of shape {tuple(tensor.shape)}")
            if not tensor.is_floating_point() and name not in self.integers:
                raise ValueError(f"a {self.end(name)} of {str(tensor.dtype).removeprefix('torch.')}")


@cache
def lycoris_layouts() -> tuple[LycorisLayout, ...]:
    """The layouts of all methods that LyCORIS's files can hold."""
    return tuple(layout for some in stated("weights.methods", "LYCORIS", LycorisLayout).values() for layout in some)


@lru_cache(maxsize=256)
def layouts_with(ends: frozenset[str]) -> tuple[LycorisLayout, ...]:
    """The layouts whose tensors may have these ends in a file."""
    return tuple(layout for layout in lycoris_layouts() if ends <= layout.ends.keys())


# What several methods read and write


def alpha_or_rank(alpha: float | None, rank: int) -> float:
    """The alpha of a file: none and 0 both stand for the rank, in LyCORIS as in kohya's scripts."""
    return alpha or float(rank)


def scaled(tensor: Tensor, scale: float) -> Tensor:
    """A multiple, not rounded to half precision."""
    return tensor if scale == 1 else widened(tensor) * scale


def widened(tensor: Tensor) -> Tensor:
    """A tensor in at least single precision."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def with_alpha(layer: LayerWeights, factor: str) -> Written:
    """The tensors and the alpha of a layer. An alpha of 0 would stand for the rank: it makes one factor 0 instead."""
    rank, alpha = number(layer, "rank"), number(layer, "alpha")
    if alpha:
        return dict(layer.tensors), alpha
    return {**layer.tensors, factor: scaled(layer.tensors[factor], 0.0)}, rank


def number(layer: LayerWeights, name: str) -> float:
    """A hyperparameter; raises a ValueError where it is not a finite number."""
    value = layer.hyperparameters.get(name)
    if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"no {name} that is a finite number")
    return value


def decomposed(read: Reader) -> Reader:
    """The reader of a method whose merged weight is decomposed into lengths and directions, as in DoRA."""

    def read_decomposed(tensors: Tensors, alpha: float | None) -> Read:
        hyperparameters, found = read(tensors, alpha)
        return {**hyperparameters, **side_of(tensors["dora_scale"])}, found

    return read_decomposed


def side_of(lengths: Tensor) -> dict[str, Hyperparameter]:
    """The hyperparameter for lengths of a weight's columns: these are in the second dimension."""
    if lengths.numel() == lengths.shape[0]:
        return {}
    if lengths.ndim < 2 or lengths.numel() != lengths.shape[1]:
        raise ValueError(f"a dora_scale {tuple(lengths.shape)}, neither for the outputs nor for the inputs")
    return {"on_inputs": True}


def read_as_is(tensors: Tensors, alpha: float | None) -> Read:
    """The tensors of a method without hyperparameters."""
    return {}, dict(tensors)


def write_as_is(layer: LayerWeights) -> Written:
    """The reverse of `read_as_is`: the tensors, and no alpha."""
    return dict(layer.tensors), None
