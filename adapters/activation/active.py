"""Active branches and their strengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from adapters.activation.context import Activation, current
from adapters.activation.mixed_batch import Rows
from adapters.activation.switch import Switch


class Switched(Protocol):
    """Anything that a patch switches: its branches."""

    switch: Switch


S = TypeVar("S", bound=Switched)


def strength(switch: Switch, activation: Activation | None) -> float | Rows:
    """The strength of a patch under an activation, or the choice for each row."""
    scale = activation.get(switch) if activation else None
    return (switch._scale if switch.enabled else 0.0) if scale is None else scale


def active(branches: Iterable[S]) -> list[tuple[S, float]] | Rows:
    """The active ones of the branches at a layer with their strengths, or the choice for each row."""
    activation, found = current(), []
    for branch in branches:
        scale = strength(branch.switch, activation)
        if isinstance(scale, Rows):
            return scale
        if scale:
            found.append((branch, scale))
    return found
