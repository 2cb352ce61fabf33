"""The forms a formula can have: added to the weight, applied to the output, or applied to the input of a layer.

And the decomposition of a weight into lengths and directions, which goes with several of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from adapters.layers.kinds import features_dim
from adapters.layers.matrix import Matrix
from adapters.methods.core.arithmetic import Scale, add_scaled, lerp
from adapters.methods.core.method import Branch, Method, Tensors
from adapters.methods.core.spec import WeightSpec


class Additive(Method):
    """`W + s Δ`, where `Δ` does not depend on `W`."""

    additive: ClassVar[bool] = True

    def delta(self, t: Tensors) -> Tensor:
        """What is added to the weight, of the shape of its matrix."""
        raise NotImplementedError

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return weight + self.delta(t)

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        return torch.add(weight, self.delta(t), alpha=scale)


class MatrixFree(Additive):
    """`W + s Δ`, where `Δ x` takes less than `Δ`, which is never made for a linear layer."""

    def product(self, x: Tensor, t: Tensors) -> Tensor:
        """`Δ x` for inputs of shape `(..., inputs)`: `(..., outputs)`."""
        raise NotImplementedError

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return matrix.kind == "linear"

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output: Tensor = layer(x, *args, **kwargs)
        return add_scaled(output, self.product(branch.cast(x), branch.values()).to(output.dtype), scale)


class LowRank(MatrixFree):
    """`W + s U D`, with `U` of a few columns and `D` of as many rows."""

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """`(U, D)`, of shapes `(outputs, rank)` and `(rank, inputs)`, with the experts in front for a stack."""
        raise NotImplementedError

    def delta(self, t: Tensors) -> Tensor:
        up, down = self.factors(t)
        return up @ down

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        up, down = self.factors(t)
        add = torch.baddbmm if weight.ndim == 3 else torch.addmm
        return add(weight, up, down, alpha=scale)

    def product(self, x: Tensor, t: Tensors) -> Tensor:
        up, down = self.factors(t)
        return F.linear(F.linear(x, down), up)


class OutputTransform(Method):
    """A linear map of the output, bias included: of the columns of the weight."""

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution", "embedding"})

    def map(self, y: Tensor, t: Tensors) -> Tensor:
        """What becomes of outputs of shape `(..., outputs)`."""
        raise NotImplementedError

    def names(self, site: WeightSpec) -> tuple[str, ...]:
        # Also where there is no bias: another branch may add one.
        return (site.parameter,) if site.bias_name is None else (site.parameter, site.bias_name)

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return self.map(weight.mT, t).mT

    def update_bias(self, bias: Tensor | None, weight: Tensor, t: Tensors) -> Tensor | None:
        return None if bias is None else self.map(bias, t)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return True

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, *args: Any, **kwargs: Any) -> Any:
        output: Tensor = layer(*args, **kwargs)
        dtype = _finer(output, branch)
        features = output.movedim(features_dim(branch.layer), -1).to(dtype)
        mapped = lerp(features, self.map(features, branch.values(dtype)).to(dtype), scale)
        return mapped.movedim(-1, features_dim(branch.layer)).to(output.dtype)


class InputTransform(Method):
    """A linear map of the input: of the rows of the weight, by its transpose."""

    def map(self, x: Tensor, t: Tensors, transposed: bool) -> Tensor:
        """What becomes of inputs of shape `(..., inputs)`, or what the transpose of that map makes of them."""
        raise NotImplementedError

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return self.map(weight, t, transposed=True)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return matrix.kind == "linear"

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dtype = _finer(x, branch)
        inputs = x.to(dtype)
        mapped = lerp(inputs, self.map(inputs, branch.values(dtype), transposed=False).to(dtype), scale)
        return layer(mapped.to(x.dtype), *args, **kwargs)


def _finer(x: Tensor, branch: Branch) -> torch.dtype:
    """The dtype to map features in: an adapter of lower precision than the model must not round what it leaves."""
    return torch.promote_types(x.dtype, branch.dtype or x.dtype)


def norms(weight: Tensor, inputs: int = 0) -> Tensor:
    """The length of each row of a matrix, `(outputs,)`; or if inputs are counted, that of the columns of each of them.

    Args:
        weight: The matrix, with the experts in front for a stack. An input of a convolution has a column for each
            position of the kernel.
        inputs: How many inputs there are, 0 for the rows.
    """
    if not inputs:
        return torch.linalg.vector_norm(weight, dim=-1)
    return torch.linalg.vector_norm(weight.unflatten(-1, (inputs, -1)), dim=(-3, -1))


def decomposed(direction: Tensor, magnitude: Tensor, on_inputs: bool = False) -> Tensor:
    """A matrix with the direction of each row, or the columns of each input, at another length.

    That is DoRA, arXiv:2402.09353. The lengths that there are are constants to the gradient, as it proposes in 4.3.
    Zeros, which have no direction, stay as they are.

    Args:
        direction: The matrix, `(outputs, inputs)`, with the experts in front for a stack.
        magnitude: The lengths, `(outputs,)` or `(inputs,)`, with the experts in front for a stack.
        on_inputs: Whether they are those of the inputs.
    """
    inputs = magnitude.shape[-1] if on_inputs else 0
    lengths = norms(direction, inputs).detach()
    zero = lengths == 0
    factors = torch.where(zero, 1.0, magnitude / torch.where(zero, 1.0, lengths))
    if not on_inputs:
        return direction * factors.unsqueeze(-1)
    return direction * factors.repeat_interleave(direction.shape[-1] // inputs, dim=-1).unsqueeze(-2)
