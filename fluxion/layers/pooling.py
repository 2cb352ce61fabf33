"""Pooling layers."""

from __future__ import annotations

from torch import nn

from fluxion.module import Module


class MaxPool1d(nn.MaxPool1d, Module):
    """`torch.nn.MaxPool1d`: `(batch, channels, length)` to a shorter length.

    Example:
        >>> fl.MaxPool1d(2)(torch.tensor([[[1.0, 2.0, 4.0, 3.0]]]))
        tensor([[[2., 4.]]])
    """

    def __init__(
        self,
        kernel_size: int,
        stride: int | None = None,
        padding: int = 0,
        dilation: int = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


class MaxPool2d(nn.MaxPool2d, Module):
    """`torch.nn.MaxPool2d`: `(batch, channels, height, width)` to a smaller height and width.

    Example:
        >>> fl.MaxPool2d(2)(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 3, 4, 4])
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        return_indices: bool = False,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__(kernel_size, stride, padding, dilation, return_indices, ceil_mode)


class AvgPool2d(nn.AvgPool2d, Module):
    """`torch.nn.AvgPool2d`: `(batch, channels, height, width)` to a smaller height and width.

    Example:
        >>> fl.AvgPool2d(2)(torch.tensor([[[[1.0, 2.0], [3.0, 6.0]]]]))
        tensor([[[[3.]]]])
    """

    def __init__(
        self,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] | None = None,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__(kernel_size, stride, padding)


class AdaptiveAvgPool2d(nn.AdaptiveAvgPool2d, Module):
    """`torch.nn.AdaptiveAvgPool2d`: `(batch, channels, height, width)` to `(batch, channels, *output_size)`.

    Example:
        >>> fl.AdaptiveAvgPool2d((1, 2))(torch.ones(1, 3, 7, 9)).shape
        torch.Size([1, 3, 1, 2])
    """

    def __init__(self, output_size: int | tuple[int, int]) -> None:
        super().__init__(output_size)
