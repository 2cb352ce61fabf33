"""Formulas that are stated by one function: an update of the weight, or a linear map of the outputs or the inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from adapters.layers.kinds import features_dim
from adapters.layers.matrix import Matrix
from adapters.methods.core.arithmetic import Scale, add_scaled, lerp
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


class Additive(Method):
    """`W + s Δ`, where `Δ` does not depend on `W`: patches of such methods can be combined."""

    additive: ClassVar[bool] = True

    def delta(self, t: Tensors) -> Tensor:
        """The update `Δ`, of the shape of the weight's matrix."""
        raise NotImplementedError

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return weight + self.delta(t)

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        return torch.add(weight, self.delta(t), alpha=scale)


class MatrixFree(Additive):
    """`W + s Δ`, where `Δ x` costs less than `Δ`, which is never made for a linear layer."""

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

    is_low_rank: ClassVar[bool] = True

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
        """Outputs of shape `(..., outputs)`, mapped."""
        raise NotImplementedError

    def changes(self, spec: WeightSpec) -> tuple[str, ...]:
        # Also where there is no bias: another branch may add one.
        return (spec.parameter,) if spec.bias_name is None else (spec.parameter, spec.bias_name)

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
        """Inputs of shape `(..., inputs)`, mapped, or mapped by the transpose."""
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


OutputMap, InputMap = OutputTransform, InputTransform
"""Their names in earlier releases."""


def _finer(x: Tensor, branch: Branch) -> torch.dtype:
    """The dtype to map features in: an adapter of lower precision must not round features that it leaves alone."""
    return torch.promote_types(x.dtype, branch.dtype or x.dtype)
