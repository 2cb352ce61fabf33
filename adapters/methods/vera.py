"""VeRA: low-rank updates that differ only in two vectors, between random matrices that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from adapters.methods.core.checks import need_number, need_rank, need_seed
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.method import Tensors
from adapters.methods.core.spec import WeightSpec


@dataclass(frozen=True)
class VeRA(LowRank):
    """Vector-based random matrix adaptation.

    `A` and `B` are as large as the largest layer needs, and each layer uses the first columns of `A` and the first
    rows of `B`. They are never trained, exist once for all layers, and are the same for the same `rank`, `seed` and
    layers; files hold them all the same, so that they do not depend on torch's generators.

    Args:
        rank: Rows of A and columns of B.
        seed: Where A and B come from.
        d_initial: What `d` starts at; `b` starts at zero.

    Raises:
        AdapterError: A number is out of its range.
    """

    key = "vera"
    paper = "arXiv:2310.11454"
    formula = "W + diag(b) B diag(d) A"
    kinds = frozenset({"linear", "convolution", "stack"})
    plus_lr = frozenset({"vera_lambda_b"})

    rank: int = 256
    seed: int = 0
    d_initial: float = 0.1

    def __post_init__(self) -> None:
        need_rank(self)
        need_seed(self)
        need_number(self, "d_initial")

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        *stack, outputs, _ = site.shape
        return {
            "vera_lambda_b": site.zeros(*stack, outputs),
            "vera_lambda_d": site.zeros(*stack, self.rank).fill_(self.d_initial),
        }

    def shared_shapes(self, sites: Sequence[WeightSpec]) -> dict[str, tuple[int, ...]]:
        outputs, inputs = largest(sites)
        return {"vera_A": (self.rank, inputs), "vera_B": (outputs, self.rank)}

    def shared(self, sites: Sequence[WeightSpec]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        empty = {
            name: torch.empty(shape, dtype=torch.float32, device="cpu")
            for name, shape in self.shared_shapes(sites).items()
        }
        return {
            name: nn.init.kaiming_uniform_(tensor, generator=generator).to(sites[0].device, sites[0].dtype)
            for name, tensor in empty.items()
        }

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        up, down = _cut(t)
        return t.vera_lambda_b.unsqueeze(-1) * up, t.vera_lambda_d.unsqueeze(-1) * down

    def product(self, x: Tensor, t: Tensors) -> Tensor:
        """With the vectors applied to the features, so that B and A need no gradients."""
        up, down = _cut(t)
        return F.linear(F.linear(x, down) * t.vera_lambda_d, up) * t.vera_lambda_b


def _cut(t: Tensors) -> tuple[Tensor, Tensor]:
    """B and A of the size of one layer."""
    outputs, inputs = t.shape[-2:]
    return t.vera_B[:outputs], t.vera_A[:, :inputs]


def largest(sites: Sequence[WeightSpec]) -> tuple[int, int]:
    """The most outputs and the most inputs that any of some weights has."""
    return max(site.shape[-2] for site in sites), max(site.shape[-1] for site in sites)
