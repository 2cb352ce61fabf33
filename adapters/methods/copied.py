"""Copied parameters: whole ones are trained, and used instead of the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from adapters.errors import TargetError
from adapters.layers.matrix import Matrix
from adapters.methods.core.method import Branch, Method, Tensors
from adapters.methods.core.spec import WeightSpec


@dataclass(frozen=True)
class Copy(Method):
    """A copy of every parameter of the modules that are named, and of all below them, such as a new head.

    Buffers, such as the running means of a batch normalisation, stay those of the model: files hold them too, and do
    not fit a model that has others.
    """

    key = "copy"
    paper = "PEFT's modules_to_save"
    formula = "C, which starts as a copy of W"
    files_have_buffers: ClassVar[bool] = True

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        return Matrix.whole(layer, parameter)

    def chooses(self, parameter: str) -> bool:
        return True

    def includes_descendants(self) -> bool:
        return True

    def default(self, model: nn.Module) -> Callable[[str, nn.Module], bool] | None:
        raise TargetError(f"{type(self).__name__} would copy the whole model: name the modules with targets=.")

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        return {"copy": site.weight.to(site.device, site.dtype, copy=True)}

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return t.copy.clone()

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        return {branch.parameter: branch.copy}
