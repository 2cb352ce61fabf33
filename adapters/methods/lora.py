"""LoRA: `W + s B A`, with `s = alpha / rank` (arXiv:2106.09685), or `alpha / √rank` for rsLoRA (arXiv:2312.03732)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.errors import AdapterError
from adapters.method import Branch, Method


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation.

    Args:
        rank: Rows of A and columns of B.
        alpha: The strength, `rank` when it is None. The update is scaled by `alpha / rank`.
        dropout: Probability of dropping each input of A in training.
        rslora: Scale by `alpha / √rank` instead.

    Raises:
        AdapterError: A number is out of its range.
    """

    key = "lora"
    layers = (nn.Linear, nn.Conv2d)

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"LoRA needs a rank of 1 or more, not {self.rank}.")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"LoRA needs a dropout of 0 or more and less than 1, not {self.dropout}.")
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))

    @property
    def scaling(self) -> float:
        """`s` of the formula."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def build(self, layer: nn.Module, device: torch.device, dtype: torch.dtype) -> Branch:
        groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
        branch = LoRABranch()
        branch.method = self
        if self.dropout:
            branch.append(fl.Dropout(self.dropout))
        if groups > 1:
            branch.append(GroupsToSamples(groups))
        branch.add_module("lora_A", self._down(layer, device, dtype))
        if groups > 1:
            branch.append(SamplesToGroups(groups))
        if self.scaling != 1:
            branch.append(fl.Multiply(self.scaling))  # Here, where there are only `rank` features.
        branch.add_module("lora_B", self._up(layer, groups, device, dtype))
        return branch

    def _down(self, layer: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A, with the geometry of the layer, Kaiming-uniform as in the paper's code."""
        if not isinstance(layer, nn.Conv2d):
            return fl.Linear(cast(nn.Linear, layer).in_features, self.rank, bias=False, device=device, dtype=dtype)
        # One A for all groups of a convolution: only so does the update have the shape of the weight.
        geometry = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
        return fl.Conv2d(
            layer.in_channels // layer.groups,
            self.rank,
            **geometry,
            padding_mode=layer.padding_mode,
            use_bias=False,
            device=device,
            dtype=dtype,
        )

    def _up(self, layer: nn.Module, groups: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """B, zero, so that nothing changes yet."""
        up: fl.Linear | fl.Conv2d
        if isinstance(layer, nn.Conv2d):
            width, channels = self.rank * groups, layer.out_channels
            up = fl.Conv2d(width, channels, 1, groups=groups, use_bias=False, device=device, dtype=dtype)
        else:
            width = cast(nn.Linear, layer).out_features
            up = fl.Linear(self.rank, width, bias=False, device=device, dtype=dtype)
        nn.init.zeros_(up.weight)
        return up


class LoRABranch(Branch):
    """`x ↦ s B A x`, and `W ↦ W + s B A`."""

    _tag = "LORA"
    method: LoRA

    def adapt(self, weight: Tensor, scale: float) -> Tensor:
        down, up = (self.tensors()[name].to(weight.dtype).flatten(1) for name in ("lora_A", "lora_B"))
        return torch.addmm(weight.flatten(1), up, down, alpha=scale * self.method.scaling).view_as(weight)


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
