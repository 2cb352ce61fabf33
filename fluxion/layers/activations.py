"""Activations: element-wise functions, gated units and the softmax."""

from __future__ import annotations

from enum import Enum

import torch
from torch import Tensor
from torch.nn import functional

from fluxion.errors import ChainValueError
from fluxion.module import Module


class Activation(Module):
    """Base of the activations.

    Example:
        >>> [type(layer).__name__ for layer in fl.Chain(fl.Linear(2, 2), fl.ReLU(), fl.Tanh()).layers(fl.Activation)]
        ['ReLU', 'Tanh']
    """


class ReLU(Activation):
    """Rectified linear unit: `max(x, 0)`, element-wise.

    Example:
        >>> fl.ReLU()(torch.tensor([-1.0, 2.0]))
        tensor([0., 2.])
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x)


class SiLU(Activation):
    """Sigmoid linear unit: `x * sigmoid(x)`, element-wise (arXiv:1702.03118).

    Example:
        >>> fl.SiLU()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7311])
    """

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(x)


class Sigmoid(Activation):
    """Logistic function: `1 / (1 + exp(-x))`, element-wise.

    Example:
        >>> fl.Sigmoid()(torch.tensor([0.0, 1.0]))
        tensor([0.5000, 0.7311])
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x)


class Tanh(Activation):
    """Hyperbolic tangent, element-wise.

    Example:
        >>> fl.Tanh()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.7616])
    """

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x)


class GeLUApproximation(Enum):
    """Formula that `GeLU` computes the normal distribution function with: exact, by tanh, or by a sigmoid.

    Example:
        >>> fl.GeLU(fl.GeLUApproximation.TANH)(torch.tensor([1.0]))
        tensor([0.8412])
    """

    NONE = "none"
    TANH = "tanh"
    SIGMOID = "sigmoid"


class GeLU(Activation):
    """Gaussian error linear unit: `x` times the normal distribution function of `x`, element-wise (arXiv:1606.08415).

    Example:
        >>> fl.GeLU()(torch.tensor([0.0, 1.0]))
        tensor([0.0000, 0.8413])
    """

    def __init__(self, approximation: GeLUApproximation = GeLUApproximation.NONE) -> None:
        super().__init__()
        self.approximation = approximation

    def forward(self, x: Tensor) -> Tensor:
        if self.approximation is GeLUApproximation.SIGMOID:
            return x * torch.sigmoid(1.702 * x)
        return functional.gelu(x, approximate=self.approximation.value)


class GLU(Activation):
    """Gated linear unit: the first half of the last dimension times the activation of the second (arXiv:2002.05202).

    Shapes: `(..., 2 * n)` to `(..., n)`.

    Raises:
        ChainValueError: The last dimension is odd.

    Example:
        >>> fl.GLU(fl.ReLU())(torch.tensor([2.0, 3.0, -1.0, 4.0]))
        tensor([ 0., 12.])
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
    """Softmax: `exp(x)` divided by its sum along `dim`.

    Example:
        >>> fl.Softmax()(torch.zeros(1, 4))
        tensor([[0.2500, 0.2500, 0.2500, 0.2500]])
    """

    def __init__(self, dim: int = -1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor) -> Tensor:
        return functional.softmax(x, dim=self.dim)
