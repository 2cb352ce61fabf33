"""Factors of a low-rank update, as layers that can run beside the layer they adapt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.layers.kinds import CONVOLUTIONS, is_conv1d
from adapters.layers.matrix import Matrix
from adapters.methods.core.spec import WeightSpec


class _Uninitialized:
    """A layer whose values are set later: torch's own initialisation takes longer than all the rest."""

    def reset_parameters(self) -> None:
        """Do nothing."""


class Linear(_Uninitialized, fl.Linear):
    """A linear layer without values."""


class Embedding(_Uninitialized, fl.Embedding):
    """An embedding without values."""


class Conv1d(_Uninitialized, fl.Conv1d):
    """A convolution without values."""


class Conv2d(_Uninitialized, fl.Conv2d):
    """A convolution without values."""


class Conv3d(_Uninitialized, fl.Conv3d):
    """A convolution without values."""


_CONVOLUTIONS: dict[int, Any] = {1: Conv1d, 2: Conv2d, 3: Conv3d}


def is_layer(layer: nn.Module, parameter: str) -> bool:
    """Whether a layer multiplies its input by a weight, so that the factors can be layers too."""
    return parameter == "weight" and (isinstance(layer, (nn.Linear, *CONVOLUTIONS)) or is_conv1d(layer))


def groups_of(layer: nn.Module) -> int:
    """The number of groups of a convolution, 1 for any other layer."""
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1


def factors(spec: WeightSpec, rank: int, bias: bool) -> tuple[fl.WeightedModule, fl.WeightedModule]:
    """A and B without values, as layers of the adapted layer's kind where that is possible.

    Args:
        spec: The weight.
        rank: Rows of A and columns of B.
        bias: Whether B has a bias.
    """
    *stack, outputs, inputs = spec.shape
    layer = spec.layer
    where: dict[str, Any] = {"device": spec.device, "dtype": spec.dtype}
    if isinstance(layer, nn.Embedding):
        down = Embedding(inputs, rank, padding_idx=layer.padding_idx, **where)
        return down, Linear(rank, outputs, bias=False, **where)
    if isinstance(layer, CONVOLUTIONS):
        conv, groups = _CONVOLUTIONS[len(layer.kernel_size)], layer.groups
        # One A for all groups of a convolution: only so does the update have the shape of the weight.
        geometry = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        channels = layer.in_channels // groups
        return (
            conv(channels, rank, **geometry, padding_mode=layer.padding_mode, use_bias=False, **where),
            conv(rank * groups, outputs, 1, groups=groups, use_bias=bias, **where),
        )
    if is_layer(layer, spec.parameter):
        return Linear(inputs, rank, bias=False, **where), Linear(rank, outputs, bias=bias, **where)
    return Factor(*stack, rank, inputs, **where), Factor(*stack, outputs, rank, **where)


def as_matrices(down: Tensor, up: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """A and B as the matrices `(rank, inputs)` and `(outputs, rank)`, with the experts in front, sharing memory."""
    if matrix.kind == "embedding":
        return down.T, up
    return (down.flatten(1), up.flatten(1)) if matrix.kind == "convolution" else (down, up)


class Factor(fl.WeightedModule):
    """A factor of an update that is only ever added to a weight."""

    def __init__(self, *shape: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


class GroupsToSamples(fl.Module):
    """`(batch, groups * channels, height, width)` to `(batch * groups, channels, height, width)`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).flatten(0, 1)


class SamplesToGroups(fl.Module):
    """`(batch * groups, channels, height, width)` to `(batch, groups * channels, height, width)`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.groups)).flatten(1, 2)
