"""Layers that reshape, select and scale, and a learned tensor."""

from __future__ import annotations

import torch
from torch import Size, Tensor, nn

from fluxion.module import Module, WeightedModule


class Identity(Module):
    """Identity: returns its input.

    Example:
        >>> fl.Parallel(fl.Identity(), fl.Multiply(2.0))(3)
        (3, 6.0)
    """

    def forward(self, x: Tensor) -> Tensor:
        return x


class GetArg(Module):
    """Selection of one of several inputs, by index.

    Example:
        >>> fl.Chain(fl.Parallel(fl.Identity(), fl.Multiply(2.0)), fl.GetArg(1))(3)
        6.0
    """

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, *args: Tensor) -> Tensor:
        return args[self.index]


class Flatten(Module):
    """`torch.flatten` from `start_dim` to `end_dim`, both included.

    Example:
        >>> fl.Flatten(start_dim=1)(torch.ones(2, 3, 4)).shape
        torch.Size([2, 12])
    """

    def __init__(self, start_dim: int = 0, end_dim: int = -1) -> None:
        super().__init__()
        self.start_dim = start_dim
        self.end_dim = end_dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.flatten(x, self.start_dim, self.end_dim)


class Unflatten(Module):
    """`torch.unflatten` of one dimension, into the sizes given as second input.

    Example:
        >>> fl.Unflatten(dim=1)(torch.ones(2, 12), (3, 4)).shape
        torch.Size([2, 3, 4])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, sizes: Size) -> Tensor:
        return torch.unflatten(x, self.dim, sizes)


class Reshape(Module):
    """`torch.reshape` of all dimensions but the first, the batch.

    Shapes: `(batch, ...)` to `(batch, *shape)`.

    Example:
        >>> fl.Reshape(4, 3)(torch.ones(2, 12)).shape
        torch.Size([2, 4, 3])
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return torch.reshape(x, (x.shape[0], *self.shape))


class Transpose(Module):
    """`torch.transpose` of two dimensions.

    Example:
        >>> fl.Transpose(1, 2)(torch.ones(2, 3, 4)).shape
        torch.Size([2, 4, 3])
    """

    def __init__(self, dim0: int, dim1: int) -> None:
        super().__init__()
        self.dim0 = dim0
        self.dim1 = dim1

    def forward(self, x: Tensor) -> Tensor:
        return torch.transpose(x, self.dim0, self.dim1)


class Permute(Module):
    """`torch.permute` of the dimensions.

    Example:
        >>> fl.Permute(2, 0, 1)(torch.ones(2, 3, 4)).shape
        torch.Size([4, 2, 3])
    """

    def __init__(self, *dims: int) -> None:
        super().__init__()
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        return torch.permute(x, self.dims)


class Slicing(Module):
    """Slice `start:end:step` of one dimension; `end=None` is its end.

    Example:
        >>> fl.Slicing(dim=1, start=1)(torch.tensor([[1, 2, 3]]))
        tensor([[2, 3]])
    """

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
    """`torch.squeeze` of one dimension.

    Example:
        >>> fl.Squeeze(1)(torch.ones(2, 1, 3)).shape
        torch.Size([2, 3])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.squeeze(x, self.dim)


class Unsqueeze(Module):
    """`torch.unsqueeze` at one dimension.

    Example:
        >>> fl.Unsqueeze(1)(torch.ones(2, 3)).shape
        torch.Size([2, 1, 3])
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return torch.unsqueeze(x, self.dim)


class Sin(Module):
    """Sine, element-wise, of radians.

    Example:
        >>> fl.Concatenate(fl.Sin(), fl.Cos())(torch.zeros(2))
        tensor([0., 0., 1., 1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


class Cos(Module):
    """Cosine, element-wise, of radians.

    Example:
        >>> fl.Cos()(torch.zeros(2))
        tensor([1., 1.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.cos(x)


class Multiply(Module):
    """Affine function of every element: `scale * x + bias`.

    Example:
        >>> fl.Multiply(scale=2.0, bias=1.0)(torch.tensor([3.0]))
        tensor([7.])
    """

    def __init__(self, scale: float = 1.0, bias: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x + self.bias


class Parameter(WeightedModule):
    """Learned tensor, expanded to the batch size of the input.

    Shapes: `(batch, ...)` to `(batch, *dims)`.

    Example:
        >>> fl.Parameter(77, 8)(torch.ones(2, 3)).shape
        torch.Size([2, 77, 8])
    """

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
        """True when the tensor is learned."""
        return self.weight.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weight.requires_grad = value


class Dropout(nn.Dropout, Module):
    """`torch.nn.Dropout`: in training mode, zeroes elements with a probability and scales the rest up.

    Example:
        >>> fl.Dropout(0.1).eval()(torch.ones(3))
        tensor([1., 1., 1.])
    """

    def __init__(self, probability: float = 0.5, inplace: bool = False) -> None:
        super().__init__(p=probability, inplace=inplace)
        self.probability = probability
