"""Linear layers."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

from fluxion.chain import Chain
from fluxion.layers.activations import ReLU
from fluxion.module import WeightedModule


class Linear(nn.Linear, WeightedModule):
    """`torch.nn.Linear`: `(..., in_features)` to `(..., out_features)`.

    Example:
        >>> fl.Linear(in_features=4, out_features=2)(torch.ones(8, 4)).shape
        torch.Size([8, 2])
    """

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
    """Perceptron of `num_layers` Linears with a ReLU between them: `(..., input_dim)` to `(..., output_dim)`.

    Example:
        >>> model = fl.MultiLinear(input_dim=4, output_dim=2, inner_dim=16, num_layers=3)
        >>> len(model), model(torch.ones(8, 4)).shape
        (5, torch.Size([8, 2]))
    """

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
