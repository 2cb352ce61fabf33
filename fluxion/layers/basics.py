"""Layers that reshape, select and scale."""

from __future__ import annotations

import torch
from torch import Size, Tensor, nn

from fluxion.module import Module, WeightedModule


class Identity(Module):
    """Returns its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class GetArg(Module):
    """Returns one of its inputs."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, *args: Tensor) -> Tensor:
        return args[self.index]


class Flatten(Module):
    """`torch.flatten` between two dimensions."""

    def __init__(self, start_dim: int = 0, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, self.start_dim, self.end_dim)


class Unflatten(Module):
    """`torch.unflatten` of one dimension, into the sizes given as second input."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, sizes: Size) -> Tensor:
        return torch.unflatten(x, self.dim, sizes)


class Reshape(Module):
    """`torch.reshape` of all dimensions but the first, the batch."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return torch.reshape(x, (x.shape[0], *self.shape))


class Transpose(Module):
    """`torch.transpose` of two dimensions."""

    def __init__(self, dim0: int, dim1: int) -> None:
        super().__init__()
        self.dim0 = dim0
        self.dim1 = dim1

    def forward(self, x: Tensor) -> Tensor:
        return torch.transpose(x, self.dim0, self.dim1)


class Permute(Module):
    """`torch.permute` of the dimensions."""

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class Slicing(Module):
    """`x[start:end:step]` along one dimension; `end=None` is the end of the dimension."""

    def __init__(self, dim: int = 0, start: int = 0, end: int | None = None, step: int = 1) -> None:
        super().__init__()
        self.dim = dim
        self.start = start
        self.end = end
        self.step = step

    def forward(self, x: Tensor) -> Tensor:
        index = [slice(None)] * x.ndim
        index[self.dim] = slice(self.start, self.end, self.step)
        return x[tuple(index)]


class Squeeze(Module):
    """`torch.squeeze` of one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.squeeze(x, self.dim)


class Unsqueeze(Module):
    """`torch.unsqueeze` at one dimension."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.unsqueeze(x, self.dim)


class Sin(Module):
    """`torch.sin`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Cos(Module):
    """`torch.cos`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x)


class Multiply(Module):
    """`scale * x + bias`."""

    def __init__(self, scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class Parameter(WeightedModule):
    """A learned tensor of shape `dims`, returned with the batch size of the input in front: `(batch, *dims)`."""

    def __init__(
        self,
        *dims: int,
        requires_grad: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dims = dims
        self.weight = nn.Parameter(torch.randn(*dims, device=device, dtype=dtype), requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight.expand(x.shape[0], *self.dims)

    @property
    def requires_grad(self) -> bool:
        """Whether the tensor is learned."""
        return self.weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weight.requires_grad = value


class Dropout(nn.Dropout, Module):
    """`torch.nn.Dropout`."""

    def __init__(self, probability: float = 0.5, inplace: bool = False) -> None:
        super().__init__(p=probability, inplace=inplace)
        self.probability = probability
