"""Interpolation and addition at a strength, one for the batch or one for each row."""

from __future__ import annotations

from torch import Tensor

Scale = float | Tensor
"""The strength of a branch, 1 for the method as its paper states it; or one for each row of a batch, `(rows,)`."""


def lerp(start: Tensor, end: Tensor, scale: Scale) -> Tensor:
    """Linear interpolation from `start` (0) to `end` (1), exact at 1."""
    if isinstance(scale, Tensor):
        return start.lerp(end, _for_rows(scale, end))
    return end if scale == 1 else start.lerp(end, scale)


def add_scaled(output: Tensor, update: Tensor, scale: Scale) -> Tensor:
    """The sum of an output and an update at a strength."""
    if isinstance(scale, Tensor):
        return output + update * _for_rows(scale, update)
    return output.add(update, alpha=scale)


def _for_rows(scale: Tensor, like: Tensor) -> Tensor:
    return scale.to(like.dtype).view(-1, *(1 for _ in like.shape[1:]))
