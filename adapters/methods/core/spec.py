"""`WeightSpec`, the description of a weight that gets a branch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.layers.dtypes import widened
from adapters.layers.matrix import Matrix


@dataclass(eq=False)
class WeightSpec:
    """A weight that gets a branch, and the device and dtype of the branch's tensors.

    Attributes:
        path: The path of the layer in the model.
        layer: The layer.
        parameter: The name of the weight in it.
        matrix: The weight as a matrix.
        device: The device of new tensors.
        dtype: Their dtype.
        read: Returns the weight that the branch will be applied to.
        uninitialized: Whether trained tensors get their values from a file, so that no others need to be made.

    Example:
        >>> def tensors(self, spec: adapters.WeightSpec) -> dict[str, Tensor]:  # in a method
        ...     outputs, inputs = spec.shape
        ...     return {"up": spec.zeros(outputs, 4), "down": spec.normal(4, inputs)}
    """

    path: str
    layer: nn.Module
    parameter: str
    matrix: Matrix
    device: torch.device
    dtype: torch.dtype
    read: Callable[[], Tensor | None] = field(repr=False)
    uninitialized: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, `(outputs, inputs)`, with the experts in front for a stack."""
        return self.matrix.shape

    @property
    def kernel(self) -> tuple[int, ...]:
        """Kernel size of a convolution, `()` for other layers."""
        return tuple(cast(Any, self.layer).kernel_size) if self.matrix.kind == "convolution" else ()

    @property
    def kind(self) -> object:
        """A key that is equal for weights whose branches of one method differ only in their values."""
        layer = self.layer
        known = type(layer).__module__.startswith("torch.nn.")  # Its `extra_repr` says all there is to it.
        look = layer.extra_repr() if known else id(layer)
        return type(layer), look, self.parameter, self.matrix, self.device, self.dtype

    @cached_property
    def weight(self) -> Tensor:
        """The matrix of the weight, in at least single precision."""
        return self.matrix.read(widened(cast(Tensor, self.read()).detach()))

    @property
    def bias_name(self) -> str | None:
        """The name of the bias that goes with the weight, even if that is None; None for a layer that has none."""
        name = f"{self.parameter.removesuffix('weight')}bias"
        return name if self.parameter.endswith("weight") and hasattr(self.layer, name) else None

    @property
    def has_bias(self) -> bool:
        """Whether the layer has a bias beside the weight."""
        return self.bias_name is not None and getattr(self.layer, self.bias_name) is not None

    def empty(self, *shape: int) -> Tensor:
        """A new tensor without values."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """A new tensor of zeros."""
        return self.empty(*shape).zero_()

    def ones(self, *shape: int) -> Tensor:
        """A new tensor of ones."""
        return self.empty(*shape).fill_(1.0)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        """A new tensor of normally distributed values of mean 0."""
        return self.empty(*shape) if self.uninitialized else self.empty(*shape).normal_(std=std)

    def shuffled(self, seed: int | None) -> Tensor:
        """The indices of the entries of the matrix, row by row, in a random order: equal on all devices for a seed."""
        count = self.shape[-2] * self.shape[-1]
        if self.device.type == "meta":
            return self.empty(count).long()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.randperm(count, generator=generator, device="cpu")

    def uniform(self, *shape: int, bound: float | None = None) -> Tensor:
        """A new tensor of uniformly distributed values in ±bound, by default the `1 / √n` of torch's linear layers."""
        bound = 1 / math.sqrt(math.prod(shape[1:])) if bound is None else bound
        return self.empty(*shape) if self.uninitialized else self.empty(*shape).uniform_(-bound, bound)
