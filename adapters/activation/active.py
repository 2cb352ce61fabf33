"""Active branches and their strengths."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol, TypeVar

from adapters.activation.context import Activation, current
from adapters.activation.mixed_batch import Rows
from adapters.activation.switch import Switch


class Switched(Protocol):
    """A branch, or anything else that a patch switches."""

    switch: Switch


S = TypeVar("S", bound=Switched)


def strength(switch: Switch, activation: Activation | None) -> float | Rows:
    """The strength of a patch under an activation, or the mixed batch."""
    scale = activation.get(switch) if activation else None
    return (switch._scale if switch.enabled else 0.0) if scale is None else scale


def active(branches: Iterable[S]) -> list[tuple[S, float]] | Rows:
    """The active ones of the branches at a layer with their strengths, or the mixed batch.

    It turns the activation of the current thread or task into strengths: every forward, compiled or not, asks here.
    """
    activation, found = current(), []
    for branch in branches:
        scale = strength(branch.switch, activation)
        if isinstance(scale, Rows):
            return scale
        if scale:
            found.append((branch, scale))
    return found
