"""DeLoRA: a low-rank update of normalised rows and columns, whose strength is a number of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adapters.methods.core.checks import is_number, need, need_rank
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors

_LEAST_NORM = 1e-4
"""The least divisor: the columns of B are zero at first."""


@dataclass(frozen=True)
class DeLoRA(LowRank):
    """Decoupled low-rank adaptation: the strength of the update does not depend on the norms of A and B.

    Args:
        rank: Rows of A and columns of B.
        boundary: Initial λ. Before the norms of the columns of W come in, the norm of the update is at most λ.

    Raises:
        AdapterError: The rank is not an integer of 1 or more, or the boundary not a finite number.

    Example:
        >>> patch = adapters.inject(model, adapters.DeLoRA(rank=4, boundary=10))
        >>> patch.merge()
        >>> patch.save_pretrained("delora")
    """

    key = "delora"
    paper = "arXiv:2503.18225"
    formula = "W + B diag(λ / (rank ‖a‖ ‖b‖)) A diag(‖w‖), over the rows a of A and the columns b of B and w of W"
    plus_lr = frozenset({"delora_B"})

    rank: int = 8
    boundary: float = 15.0

    def __post_init__(self) -> None:
        need_rank(self)
        need(is_number(self.boundary), self, "a boundary that is a finite number", self.boundary)

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        outputs, inputs = spec.shape
        return {
            "delora_A": spec.uniform(self.rank, inputs),
            "delora_B": spec.zeros(outputs, self.rank),
            "delora_lambda": spec.ones(1) * self.boundary,
        }

    def constants(self, spec: WeightSpec) -> dict[str, Tensor]:
        return {"delora_w_norm": spec.weight.norm(dim=0).to(spec.device, spec.dtype)}

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        lengths = t.delora_A.norm(dim=1).clamp(min=_LEAST_NORM) * t.delora_B.norm(dim=0).clamp(min=_LEAST_NORM)
        return t.delora_B * (t.delora_lambda / self.rank / lengths), t.delora_A * t.delora_w_norm
