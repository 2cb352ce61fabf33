"""Activations: element-wise functions and the softmax."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from fluxion.errors import ChainValueError
from fluxion.module import Module


class Activation(Module):
    """Base of the activations."""


class ReLU(Activation):
    """`max(x, 0)`."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x)


class SiLU(Activation):
    """`x * sigmoid(x)` (arXiv:1702.03118)."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x)


class Sigmoid(Activation):
    """`1 / (1 + exp(-x))`."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class Tanh(Activation):
    """The hyperbolic tangent."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class GeLUApproximation(Enum):
    """How `GeLU` computes the normal distribution: exactly, by tanh, or by a sigmoid."""

    NONE = "none"
    TANH = "tanh"
    SIGMOID = "sigmoid"


class GeLU(Activation):
    """`x` times the normal distribution function of `x` (arXiv:1606.08415), or an approximation from there."""

    def __init__(self, approximation: GeLUApproximation = GeLUApproximation.NONE) -> None:
        super().__init__()
        self.approximation = approximation

    def forward(self, x: Tensor) -> Tensor:
        if self.approximation is GeLUApproximation.SIGMOID:
            return x * torch.sigmoid(1.702 * x)
        return functional.gelu(x, approximate=self.approximation.value)


class GLU(Activation):
    """The first half of the last dimension times the activation of the second half (arXiv:2002.05202).

    Shapes: `(..., 2 * n)` to `(..., n)`.
    """

    def __init__(self, activation: Activation) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] % 2:
            raise ChainValueError(f"GLU halves the last dimension, which is {x.shape[-1]} here: make it even.")
        output, gate = x.chunk(2, dim=-1)
        return output * self.activation(gate)

    def __str__(self) -> str:
        return f"GLU(activation={self.activation})"


class Softmax(Activation):
    """`exp(x)` divided by its sum along `dim`."""

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return functional.softmax(x, dim=self.dim)
