"""`Switch`, the activation state of a patch."""

from __future__ import annotations

import math
from numbers import Real

from adapters.errors import AdapterError


class Switch:
    """The name of a patch, its scale, and whether it is enabled. Setting one is O(1) in the size of the model.

    Attributes:
        name: The name of the patch, unique in the model.
        enabled: Whether the patch is active where `adapters.use` does not say otherwise.

    Example:
        >>> switch = Switch("style", 1.0)
        >>> switch.scale, switch.enabled = 0.5, False
    """

    def __init__(self, name: str, scale: float) -> None:
        self.name = name
        self._scale = finite(scale, f"The scale of {name!r}")
        self.enabled = True

    @property
    def scale(self) -> float:
        """The strength: 1 as trained, 0 not at all.

        Raises:
            AdapterError: It is set to a value that is not a finite number.
        """
        return self._scale

    @scale.setter
    def scale(self, scale: float) -> None:
        self._scale = finite(scale, f"The scale of {self.name!r}")

    def path_of(self, branch: object) -> str:
        """The path of the layer of one of its branches; empty where that is unknown."""
        return ""


def finite(scale: float, what: str) -> float:
    """A scale as a float.

    Raises:
        AdapterError: It is not a finite number.
    """
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise AdapterError(f"{what} has to be a finite number, not {scale!r}.")
    return float(scale)
