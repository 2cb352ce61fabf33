"""Changes of resolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Size, Tensor
from torch.nn import functional

from fluxion.chain import Chain
from fluxion.combinators import Parallel
from fluxion.layers.basics import Identity
from fluxion.layers.conv import Conv2d
from fluxion.layers.padding import ZeroPad2d
from fluxion.leaves import SetContext, UseContext
from fluxion.module import Module


class Interpolate(Module):
    """`torch.nn.functional.interpolate` of `(batch, channels, ...)` to the size given as second input, in pixels.

    Example:
        >>> fl.Interpolate(mode="bilinear")(torch.ones(1, 3, 4, 4), (8, 6)).shape
        torch.Size([1, 3, 8, 6])
    """

    def __init__(self, mode: str = "nearest", antialias: bool = False) -> None:
        super().__init__()
        self.mode = mode
        self.antialias = antialias

    def forward(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        return functional.interpolate(x, size=list(shape), mode=self.mode, antialias=self.antialias)


class Downsample(Chain):
    """Convolution of stride `scale_factor`: `(batch, channels, height, width)` to a smaller height and width.

    With `register_shape` the size of the input is pushed to the list in the context `"sampling"`, entry `"shapes"`,
    for an `Upsample` to pop: an ancestor provides that list.

    Example:
        >>> fl.Downsample(channels=4, scale_factor=2, register_shape=False)(torch.ones(1, 4, 8, 8)).shape
        torch.Size([1, 4, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        scale_factor: int,
        padding: int = 0,
        register_shape: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.channels = channels
        self.in_channels = channels
        self.out_channels = channels
        self.scale_factor = scale_factor
        self.padding = padding
        conv = Conv2d(channels, channels, 3, stride=scale_factor, padding=padding, device=device, dtype=dtype)
        super().__init__(
            *([SetContext("sampling", "shapes", callback=_push_size)] if register_shape else []),
            *([ZeroPad2d((0, 1, 0, 1))] if padding == 0 else []),
            conv,
        )


class Upsample(Chain):
    """Interpolation and a convolution: `(batch, channels, height, width)` to a larger height and width.

    The new size is `upsample_factor` times the old one, or when that is None, the size that the matching `Downsample`
    pushed to the context.

    Example:
        >>> fl.Upsample(channels=4, upsample_factor=2)(torch.ones(1, 4, 8, 8)).shape
        torch.Size([1, 4, 16, 16])
    """

    def __init__(
        self,
        channels: int,
        upsample_factor: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.channels = channels
        self.upsample_factor = upsample_factor
        super().__init__(
            Parallel(
                Identity(),
                UseContext("sampling", "shapes").compose(_pop_size)
                if upsample_factor is None
                else _ScaledSize(upsample_factor),
            ),
            Interpolate(),
            Conv2d(channels, channels, 3, padding=1, device=device, dtype=dtype),
        )


class _ScaledSize(Module):
    def __init__(self, factor: int) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Size:
        return Size(size * self.factor for size in x.shape[2:])


def _push_size(shapes: list[Size], x: Tensor) -> None:
    shapes.append(x.shape[2:])


def _pop_size(shapes: list[Size]) -> Size:
    return shapes.pop()
