"""GraLoRA: each block of the weight has a low-rank update of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from adapters.errors import TargetError
from adapters.methods.core.checks import alpha_of, is_integer, need, need_alpha, need_count, need_rank
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class GraLoRA(LowRank):
    """Granular low-rank adaptation.

    The weight is cut into `blocks` times `blocks` parts, each with an update of the rank `rank / blocks`. So there are
    as many tensors to train as in LoRA of the same rank, and the rank of the whole is `blocks` times as high.

    Args:
        rank: The sum of the ranks in a row or a column of blocks. A multiple of `blocks`.
        alpha: The strength, `rank` when it is None. The update is scaled by `alpha / (rank + hybrid_rank)`.
        blocks: The number of parts of the inputs, and of the outputs, which has to divide both.
        hybrid_rank: The rank of an ordinary LoRA beside the blocks, 0 for none.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.GraLoRA(rank=4, blocks=2))
        >>> patch.merge()
        >>> patch.save_pretrained("gralora")
    """

    key = "gralora"
    paper = "arXiv:2505.20355"
    formula = "W + s [Bᵢⱼ Aᵢⱼ], with s = alpha / rank"
    kinds = frozenset({"linear", "convolution", "embedding", "stack"})
    plus_lr = frozenset({"gralora_B", "gralora_B_general"})

    rank: int = 32
    alpha: float | None = None
    blocks: int = 2
    hybrid_rank: int = 0

    def __post_init__(self) -> None:
        need_rank(self)
        need_alpha(self)
        need_count(self, "blocks")
        need(self.rank % self.blocks == 0, self, f"a rank that is a multiple of blocks={self.blocks}", self.rank)
        hybrid = self.hybrid_rank
        need(is_integer(hybrid, 0), self, "a hybrid_rank that is an integer of 0 or more", hybrid)

    @property
    def scaling(self) -> float:
        """`s` of the formula."""
        return alpha_of(self) / (self.rank + self.hybrid_rank)

    def check_spec(self, spec: WeightSpec) -> None:
        outputs, inputs = spec.shape[-2:]
        if outputs % self.blocks or inputs % self.blocks:
            raise TargetError(
                f"{spec.path} is {outputs} × {inputs}, not multiples of blocks={self.blocks}: choose a number that"
                " divides both, or exclude the layer."
            )

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        *stack, outputs, inputs = spec.shape
        width, height = inputs // self.blocks, outputs // self.blocks
        tensors = {
            "gralora_A": spec.uniform(*stack, self.blocks, width, self.rank, bound=width**-0.5),
            "gralora_B": spec.zeros(*stack, self.blocks, self.rank, height),
        }
        if self.hybrid_rank:
            tensors["gralora_A_general"] = spec.uniform(*stack, self.hybrid_rank, inputs, bound=inputs**-0.5)
            tensors["gralora_B_general"] = spec.zeros(*stack, outputs, self.hybrid_rank)
        return tensors

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        # Of block i of the outputs and j of the inputs, the tensors hold A[j] and B[i]: its part of the rank, r, is
        # the i-th of A[j] and the j-th of B[i]. Elsewhere in its rows and columns are zeros.
        parts = (self.blocks, self.rank // self.blocks)
        here = torch.eye(self.blocks, dtype=t.gralora_A.dtype, device=t.gralora_A.device)
        down = torch.einsum("...jwir,jJ->...ijrJw", t.gralora_A.unflatten(-1, parts), here)
        up = torch.einsum("...ijrh,iI->...Ihijr", t.gralora_B.unflatten(-2, parts), here)
        down, up = down.flatten(-2).flatten(-4, -2), up.flatten(-3).flatten(-3, -2)
        if self.hybrid_rank:
            down, up = torch.cat([down, t.gralora_A_general], -2), torch.cat([up, t.gralora_B_general], -1)
        return up * self.scaling, down

    def product(self, x: Tensor, t: Tensors) -> Tensor:
        parts = (self.blocks, self.rank // self.blocks)
        middle = torch.einsum("...jw,jwk->...jk", x.unflatten(-1, (self.blocks, -1)), t.gralora_A)
        middle = middle.unflatten(-1, parts).transpose(-3, -2).flatten(-2)
        output = torch.einsum("...ik,ikh->...ih", middle, t.gralora_B).flatten(-2)
        if self.hybrid_rank:
            output = output + F.linear(F.linear(x, t.gralora_A_general), t.gralora_B_general)
        return output * self.scaling
