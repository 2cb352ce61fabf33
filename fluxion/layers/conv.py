"""Convolutions and transposed convolutions."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from fluxion.module import WeightedModule

Size = int | tuple[int, ...]
"""One number for all dimensions, or one for each."""
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


class Convolution(WeightedModule):
    """Base of the convolutions: torch's constructor, with arguments in the order that chains use."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | Literal["same", "valid"] = 0,
        groups: int = 1,
        use_bias: bool = True,
        dilation: Size = 1,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=use_bias,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.use_bias = use_bias


class TransposedConvolution(WeightedModule):
    """Base of the transposed convolutions: torch's constructor, with `use_bias` for `bias`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        use_bias: bool = True,
        dilation: Size = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            bias=use_bias,
            dilation=dilation,
            padding_mode=padding_mode,
            device=device,
            dtype=dtype,
        )
        self.use_bias = use_bias


class Conv1d(Convolution, nn.Conv1d):
    """`torch.nn.Conv1d` of `(batch, in_channels, length)`.

    Example:
        >>> fl.Conv1d(3, 8, kernel_size=3, padding=1)(torch.ones(1, 3, 16)).shape
        torch.Size([1, 8, 16])
    """


class Conv2d(Convolution, nn.Conv2d):
    """`torch.nn.Conv2d` of `(batch, in_channels, height, width)`.

    Example:
        >>> fl.Conv2d(3, 8, kernel_size=3, stride=2, padding=1)(torch.ones(1, 3, 16, 16)).shape
        torch.Size([1, 8, 8, 8])
    """


class Conv3d(Convolution, nn.Conv3d):
    """`torch.nn.Conv3d` of `(batch, in_channels, depth, height, width)`.

    Example:
        >>> fl.Conv3d(3, 8, kernel_size=3)(torch.ones(1, 3, 4, 16, 16)).shape
        torch.Size([1, 8, 2, 14, 14])
    """


class ConvTranspose1d(TransposedConvolution, nn.ConvTranspose1d):
    """`torch.nn.ConvTranspose1d` of `(batch, in_channels, length)`.

    Example:
        >>> fl.ConvTranspose1d(3, 8, kernel_size=2, stride=2)(torch.ones(1, 3, 16)).shape
        torch.Size([1, 8, 32])
    """


class ConvTranspose2d(TransposedConvolution, nn.ConvTranspose2d):
    """`torch.nn.ConvTranspose2d` of `(batch, in_channels, height, width)`.

    Example:
        >>> fl.ConvTranspose2d(3, 8, kernel_size=2, stride=2)(torch.ones(1, 3, 16, 16)).shape
        torch.Size([1, 8, 32, 32])
    """


class ConvTranspose3d(TransposedConvolution, nn.ConvTranspose3d):
    """`torch.nn.ConvTranspose3d` of `(batch, in_channels, depth, height, width)`.

    Example:
        >>> fl.ConvTranspose3d(3, 8, kernel_size=2, stride=2)(torch.ones(1, 3, 4, 16, 16)).shape
        torch.Size([1, 8, 8, 32, 32])
    """
