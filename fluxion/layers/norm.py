"""Normalisation layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fluxion.module import Module, WeightedModule


class LayerNorm(nn.LayerNorm, WeightedModule):
    """`torch.nn.LayerNorm` over the last dimensions, with weight and bias (arXiv:1607.06450).

    Example:
        >>> fl.LayerNorm(2)(torch.tensor([[1.0, 3.0]])).round(decimals=2)
        tensor([[-1., 1.]], grad_fn=<RoundBackward1>)
    """

    weight: nn.Parameter

    def __init__(
        self,
        normalized_shape: int | list[int],
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps=eps, device=device, dtype=dtype)


class RMSNorm(nn.RMSNorm, WeightedModule):
    """`torch.nn.RMSNorm` over the last dimensions, with weight (arXiv:1910.07467).

    Example:
        >>> fl.RMSNorm(2)(torch.tensor([[3.0, 3.0]])).round(decimals=2)
        tensor([[1., 1.]], grad_fn=<RoundBackward1>)
    """

    weight: nn.Parameter

    def __init__(
        self,
        normalized_shape: int | list[int],
        eps: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(normalized_shape, eps=eps, device=device, dtype=dtype)


class GroupNorm(nn.GroupNorm, WeightedModule):
    """`torch.nn.GroupNorm` of `(batch, channels, ...)`, with weight and bias (arXiv:1803.08494).

    Example:
        >>> fl.GroupNorm(channels=8, num_groups=2)(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    weight: nn.Parameter

    def __init__(
        self,
        channels: int,
        num_groups: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_groups, channels, eps=eps, device=device, dtype=dtype)
        self.channels = channels


class BatchNorm1d(nn.BatchNorm1d, WeightedModule):
    """`torch.nn.BatchNorm1d` of `(batch, channels)` or `(batch, channels, length)` (arXiv:1502.03167).

    Example:
        >>> fl.BatchNorm1d(8)(torch.ones(4, 8)).shape
        torch.Size([4, 8])
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, device=device, dtype=dtype)


class BatchNorm2d(nn.BatchNorm2d, WeightedModule):
    """`torch.nn.BatchNorm2d` of `(batch, channels, height, width)` (arXiv:1502.03167).

    Example:
        >>> fl.BatchNorm2d(8)(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    weight: nn.Parameter

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum, device=device, dtype=dtype)


class LayerNorm2d(WeightedModule):
    """Layer normalisation over the channels of `(batch, channels, height, width)`, with weight and bias.

    Example:
        >>> fl.LayerNorm2d(8)(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(channels, device=device, dtype=dtype))
        self.channels = channels
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, dim=1, keepdim=True, correction=0)
        normal = (x - mean) * torch.rsqrt(variance + self.eps)
        return self.weight[:, None, None] * normal + self.bias[:, None, None]


class InstanceNorm2d(nn.InstanceNorm2d, Module):
    """`torch.nn.InstanceNorm2d` of `(batch, channels, height, width)`, without weights (arXiv:1607.08022).

    Example:
        >>> fl.InstanceNorm2d(8)(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps=eps, device=device, dtype=dtype)
