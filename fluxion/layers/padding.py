"""Padding and the rearrangement of pixels."""

from __future__ import annotations

from torch import nn

from fluxion.module import Module


class ReflectionPad2d(nn.ReflectionPad2d, Module):
    """`torch.nn.ReflectionPad2d` of `(batch, channels, height, width)`."""

    def __init__(self, padding: int | tuple[int, int, int, int]) -> None:
        super().__init__(padding)


class ZeroPad2d(nn.ZeroPad2d, Module):
    """`torch.nn.ZeroPad2d` of `(batch, channels, height, width)`."""

    def __init__(self, padding: int | tuple[int, int, int, int]) -> None:
        super().__init__(padding)


class PixelShuffle(nn.PixelShuffle, Module):
    """`torch.nn.PixelShuffle`: `(batch, c * f * f, h, w)` to `(batch, c, h * f, w * f)`."""

    def __init__(self, upscale_factor: int) -> None:
        super().__init__(upscale_factor)


class PixelUnshuffle(nn.PixelUnshuffle, Module):
    """`torch.nn.PixelUnshuffle`: `(batch, c, h * f, w * f)` to `(batch, c * f * f, h, w)`."""

    def __init__(self, downscale_factor: int) -> None:
        super().__init__(downscale_factor)
