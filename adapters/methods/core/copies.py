"""Copies of parameters, which are trained and used instead of the model's own."""

from __future__ import annotations

from torch import Tensor, nn

from adapters.layers.matrix import Matrix
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


class ParameterCopy(Method):
    """A parameter that starts as a copy of the model's own, of any shape."""

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        return Matrix.whole(layer, parameter)

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        return {"copy": spec.weight.to(spec.device, spec.dtype, copy=True)}

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return t.copy.clone()

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        return {branch.parameter: branch.copy}
