"""BitFit: the biases are trained, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adapters.layers.matrix import Matrix
from adapters.methods.copied import Copy
from adapters.methods.core.copies import ParameterCopy
from adapters.methods.core.method import Branch, Method

_BIASES = frozenset({"bias", "in_proj_bias"})


@dataclass(frozen=True)
class BitFit(ParameterCopy):
    """A copy of every bias of the layers that are named: by default of all but the output head, normalisations too.

    A layer that has no bias gets none. Files hold the trained biases as those of `Copy`.

    Example:
        >>> patch = adapters.inject(model, adapters.BitFit())
        >>> print(sum(parameter.numel() for parameter in patch.parameters()))
        >>> patch.save_pretrained("biases")
    """

    key = "bitfit"
    paper = "arXiv:2106.10199"
    formula = "b', which starts as a copy of the bias b"
    stored_as = Copy.key

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        return super().matrix(layer, parameter) if self.selects(parameter) else None

    def selects(self, parameter: str) -> bool:
        return parameter in _BIASES

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        return Copy(), self.file_tensors(branch)
