"""`WeightSpec`, a weight that gets a branch."""

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
    """A weight that is to have a branch, and where the branch's tensors go.

    Attributes:
        path: The path of the layer in the model.
        layer: The layer.
        parameter: The name of the weight in it.
        matrix: What the weight is as a matrix.
        device: The device of new tensors.
        dtype: Their dtype.
        read: Gives the weight that the new branch will be applied to.
        blank: Whether what is trained gets its values from a file, so that no others need to be made.
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
        """Of the matrix: `(outputs, inputs)`, with the experts in front for a stack."""
        return self.matrix.shape

    @property
    def kernel(self) -> tuple[int, ...]:
        """The size of the kernel of a convolution, `()` for what is none."""
        return tuple(cast(Any, self.layer).kernel_size) if self.matrix.kind == "convolution" else ()

    @property
    def kind(self) -> object:
        """Equal for weights whose branches of one method differ only in their values."""
        layer = self.layer
        known = type(layer).__module__.startswith("torch.nn.")  # What it says of itself is all there is to it.
        look = layer.extra_repr() if known else id(layer)
        return type(layer), look, self.parameter, self.matrix, self.device, self.dtype

    @cached_property
    def weight(self) -> Tensor:
        """The matrix of the weight, in at least single precision."""
        return self.matrix.read(widened(cast(Tensor, self.read()).detach()))

    @property
    def bias_name(self) -> str | None:
        """The name of the bias that goes with the weight, be it None; None where the layer knows no such parameter."""
        name = f"{self.parameter.removesuffix('weight')}bias"
        return name if self.parameter.endswith("weight") and hasattr(self.layer, name) else None

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias to what it makes of the weight."""
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
        """A new tensor of normally distributed values around 0."""
        return self.empty(*shape) if self.uninitialized else self.empty(*shape).normal_(std=std)

    def shuffled(self, seed: int | None) -> Tensor:
        """The places in a matrix, counted row by row, in a random order: for one seed the same on any device."""
        count = self.shape[-2] * self.shape[-1]
        if self.device.type == "meta":
            return self.empty(count).long()
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return torch.randperm(count, generator=generator, device="cpu")

    def uniform(self, *shape: int, bound: float | None = None) -> Tensor:
        """A new tensor of values up to a bound to either side; by default that of torch's linear layers, `1 / √n`."""
        bound = 1 / math.sqrt(math.prod(shape[1:])) if bound is None else bound
        return self.empty(*shape) if self.uninitialized else self.empty(*shape).uniform_(-bound, bound)
