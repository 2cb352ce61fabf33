"""`Switch`, the activation state of a patch."""

from __future__ import annotations

import math
from numbers import Real

from adapters.errors import AdapterError


class Switch:
    """The name of a patch, its scale, and whether it is enabled. Setting one takes the same time for any model.

    Attributes:
        name: The name of the patch, unique in the model.
        enabled: Whether the patch acts where `adapters.use` does not say otherwise.
    """

    def __init__(self, name: str, scale: float) -> None:
        self.name = name
        self._scale = finite(scale, f"The scale of {name!r}")
        self.enabled = True

    @property
    def scale(self) -> float:
        """The strength: 1 as trained, 0 not at all.

        Raises:
            AdapterError: It is set to what is no finite number.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = finite(scale, f"The scale of {self.name!r}")

    def path_of(self, branch: object) -> str:
        """The path of the layer that one of its branches is at; empty where that is unknown."""
        return ""


def finite(scale: float, what: str) -> float:
    """A scale as a float.

    Raises:
        AdapterError: It is no finite number.
    """
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise AdapterError(f"{what} has to be a finite number, not {scale!r}.")
    return float(scale)
