"""BitFit: the biases are trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from adapters.layers.matrix import Matrix
from adapters.methods.copied import Copy
from adapters.methods.core.method import Branch, Method

_BIASES = frozenset({"bias", "in_proj_bias"})


@dataclass(frozen=True)
class BitFit(Copy):
    """A copy of every bias of the layers that are named: by default of all but the output head, normalisations too.

    A layer that has no bias gets none. Files hold the trained biases as those of `Copy`.
    """

    key = "bitfit"
    paper = "arXiv:2106.10199"
    formula = "b', which starts as a copy of the bias b"
    files_have_buffers: ClassVar[bool] = False
    stored_as: ClassVar[str] = "copy"

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        return Matrix.whole(layer, parameter) if self.chooses(parameter) else None

    def chooses(self, parameter: str) -> bool:
        return parameter in _BIASES

    def includes_descendants(self) -> bool:
        return False

    def default(self, model: nn.Module) -> None:
        return None

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        return Copy(), self.file_tensors(branch)
