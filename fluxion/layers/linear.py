"""Layers made of matrix products."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from fluxion.chain import Chain
from fluxion.layers.activations import ReLU
from fluxion.module import WeightedModule


class Linear(nn.Linear, WeightedModule):
    """`torch.nn.Linear`: `(..., in_features)` to `(..., out_features)`."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias=bias, device=device, dtype=dtype)


class MultiLinear(Chain):
    """`num_layers` Linears with a ReLU between them: `(..., input_dim)` to `(..., output_dim)`."""

    def __init__(
        self,
        input_dim: int,
        output_dim: int,
        inner_dim: int,
        num_layers: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        widths = [input_dim, *[inner_dim] * (num_layers - 1), output_dim]
        layers: list[nn.Module] = []
        for width_in, width_out in pairwise(widths):
            layers += [Linear(width_in, width_out, device=device, dtype=dtype), ReLU()]
        super().__init__(layers[:-1])
