"""The tensors of a checkpoint, of one model or of all models of a pipeline, by one name each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import weights

if TYPE_CHECKING:
    from torch import Tensor

    from weights.header import Slot


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, with that of their model in front where they are of a pipeline."""

    parts: Mapping[str, weights.TensorFiles]

    @classmethod
    def open(cls, source: str) -> Checkpoint:
        """Open what is on this machine or on the Hub; the headers are read."""
        return cls(weights.open_parts(source))

    @cached_property
    def slots(self) -> Mapping[str, Slot]:
        """The type and the shape of each tensor."""
        return {
            f"{part}.{name}".removeprefix("."): slot
            for part, tensors in self.parts.items()
            for name, slot in tensors.slots.items()
        }

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        part, _, rest = ("", "", name) if "" in self.parts else name.partition(".")
        return self.parts[part][rest]
