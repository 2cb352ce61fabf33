"""DeLoRA: a low-rank update of normalised rows and columns, whose strength is a number of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adapters.methods.core.checks import is_number, need, need_rank
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.method import Tensors
from adapters.methods.core.spec import WeightSpec

_LEAST_NORM = 1e-4
"""What shorter rows and columns are divided by: at the start, those of B are zero."""


@dataclass(frozen=True)
class DeLoRA(LowRank):
    """Decoupled low-rank adaptation: how far the weight moves does not depend on the lengths of A and B.

    Args:
        rank: Rows of A and columns of B.
        boundary: What λ starts at: before the norms of the columns of W come in, the update is no longer than λ.

    Raises:
        AdapterError: The rank is no integer of 1 or more, or the boundary no finite number.
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

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        outputs, inputs = site.shape
        return {
            "delora_A": site.uniform(self.rank, inputs),
            "delora_B": site.zeros(outputs, self.rank),
            "delora_lambda": site.ones(1) * self.boundary,
        }

    def constants(self, site: WeightSpec) -> dict[str, Tensor]:
        return {"delora_w_norm": site.weight.norm(dim=0).to(site.device, site.dtype)}

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        lengths = t.delora_A.norm(dim=1).clamp(min=_LEAST_NORM) * t.delora_B.norm(dim=0).clamp(min=_LEAST_NORM)
        return t.delora_B * (t.delora_lambda / self.rank / lengths), t.delora_A * t.delora_w_norm
