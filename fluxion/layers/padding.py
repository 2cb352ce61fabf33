"""Padding, and rearrangement of pixels and channels."""

from __future__ import annotations

from torch import nn

from fluxion.module import Module


class ReflectionPad2d(nn.ReflectionPad2d, Module):
    """`torch.nn.ReflectionPad2d` of `(batch, channels, height, width)`; padding in pixels: left, right, top, bottom.

    Example:
        >>> fl.ReflectionPad2d((1, 1, 0, 0))(torch.tensor([[[[1, 2, 3]]]]))
        tensor([[[[2, 1, 2, 3, 2]]]])
    """

    def __init__(self, padding: int | tuple[int, int, int, int]) -> None:
        super().__init__(padding)


class ZeroPad2d(nn.ZeroPad2d, Module):
    """`torch.nn.ZeroPad2d` of `(batch, channels, height, width)`; padding in pixels: left, right, top, bottom.

    Example:
        >>> fl.ZeroPad2d((1, 1, 0, 0))(torch.tensor([[[[1, 2, 3]]]]))
        tensor([[[[0, 1, 2, 3, 0]]]])
    """

    def __init__(self, padding: int | tuple[int, int, int, int]) -> None:
        super().__init__(padding)


class PixelShuffle(nn.PixelShuffle, Module):
    """`torch.nn.PixelShuffle`: `(batch, c * f * f, h, w)` to `(batch, c, h * f, w * f)` (arXiv:1609.05158).

    Example:
        >>> fl.PixelShuffle(upscale_factor=2)(torch.ones(1, 12, 4, 4)).shape
        torch.Size([1, 3, 8, 8])
    """

    def __init__(self, upscale_factor: int) -> None:
        super().__init__(upscale_factor)


class PixelUnshuffle(nn.PixelUnshuffle, Module):
    """`torch.nn.PixelUnshuffle`: `(batch, c, h * f, w * f)` to `(batch, c * f * f, h, w)` (arXiv:1609.05158).

    Example:
        >>> fl.PixelUnshuffle(downscale_factor=2)(torch.ones(1, 3, 8, 8)).shape
        torch.Size([1, 12, 4, 4])
    """

    def __init__(self, downscale_factor: int) -> None:
        super().__init__(downscale_factor)
