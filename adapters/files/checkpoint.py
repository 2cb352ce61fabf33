"""The tensors of a checkpoint, of one model or of all models of a pipeline, by one name each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING

import weights
from adapters.layers.dtypes import is_narrow

if TYPE_CHECKING:
    from torch import Tensor

    from weights.disk.header import Slot


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, with that of their model in front where they are of a pipeline."""

    parts: Mapping[str, weights.TensorFiles]

    @classmethod
    def open(cls, source: str | PathLike[str]) -> Checkpoint:
        """Open what is on this machine or on the Hub; the headers are read."""
        return cls(weights.open_parts(source))

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """The type and the shape of each tensor."""
        return {name: self.parts[part].slots[own] for name, (part, own) in self._places.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        part, own = self._places[name]
        return self.parts[part][own]

    def is_quantized(self, name: str) -> bool:
        """Whether the numbers of a tensor are not the weight itself."""
        dtype, scale = self.slots[name].dtype, f"{name.rpartition('.')[0]}.scale_weight"
        return not dtype.is_floating_point or (
            is_narrow(dtype) and any(other.startswith(f"{name}_scale") or other == scale for other in self.slots)
        )

    @cached_property
    def _places(self) -> Mapping[str, tuple[str, str]]:
        """The model of each tensor, and the name in it."""
        return {
            f"{part}.{own}".removeprefix("."): (part, own) for part, tensors in self.parts.items() for own in tensors
        }
