"""MiSS and Bat: one small block, repeated over the weight, is added to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from adapters.errors import TargetError
from adapters.methods.core.checks import is_integer, need, need_rank
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.method import Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class MiSS(LowRank):
    """Matrix shard sharing: every run of `rank` inputs has the same update.

    Args:
        rank: The number of inputs in a run.
        mini_r: Repeat it over runs of this many outputs too, a divisor of their number; 0 for all outputs.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.MiSS(rank=4))
        >>> print(patch.num_parameters())
        >>> patch.save_pretrained("miss")
    """

    key = "miss"
    paper = "arXiv:2409.15371"
    formula = "W + [Bᵀ Bᵀ ...]"

    rank: int = 64
    mini_r: int = 0

    def __post_init__(self) -> None:
        need_rank(self)
        mini = self.mini_r
        need(is_integer(mini, 0), self, "a mini_r that is an integer of 0 or more", mini)

    def check_spec(self, spec: WeightSpec) -> None:
        outputs, inputs = spec.shape
        if self.rank > inputs or (self.mini_r and outputs % self.mini_r):
            raise TargetError(
                f"{spec.path} has {outputs} outputs and {inputs} inputs, which do not fit rank={self.rank} and"
                f" mini_r={self.mini_r}: choose a rank of {inputs} or less and a mini_r that divides {outputs}, or"
                " exclude it."
            )

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        return {"miss_block": spec.zeros(self.rank, self.mini_r or spec.shape[-2])}

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        outputs, inputs = t.shape
        block = t.miss_block
        sums = torch.eye(self.rank, device=block.device, dtype=block.dtype).repeat(1, -(-inputs // self.rank))
        return block.T.repeat(outputs // block.shape[-1], 1), sums[:, :inputs]

    def product(self, x: Tensor, t: Tensors) -> Tensor:
        block, (outputs, inputs) = t.miss_block, t.shape
        runs = F.pad(x, (0, -inputs % self.rank)).unflatten(-1, (-1, self.rank))
        return (runs.sum(-2) @ block).repeat(*(1 for _ in x.shape[1:]), outputs // block.shape[-1])


@dataclass(frozen=True)
class Bat(Method):
    """Block affine transformation: MiSS whose update depends on the weight.

    Args:
        rank: The size of the blocks, which has to divide both the outputs and the inputs.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.Bat(rank=4))
        >>> patch.merge()
        >>> patch.save_pretrained("bat")
    """

    key = "bat"
    paper = "arXiv:2409.15371"
    formula = "Wᵢⱼ + Wᵢⱼ Bᵢ + Bᵢ, in blocks"

    rank: int = 64

    def __post_init__(self) -> None:
        need_rank(self)

    def check_spec(self, spec: WeightSpec) -> None:
        outputs, inputs = spec.shape
        if outputs % self.rank or inputs % self.rank:
            raise TargetError(
                f"{spec.path} has {outputs} outputs and {inputs} inputs, which rank={self.rank} does not divide: choose"
                " a common divisor, or exclude it."
            )

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        return {"miss_block": spec.zeros(spec.shape[-2] // self.rank, self.rank, self.rank)}

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        blocks = weight.unflatten(1, (-1, self.rank)).unflatten(0, (-1, self.rank)).transpose(1, 2)
        own = t.miss_block.unsqueeze(1)
        return (blocks + blocks @ own + own).transpose(1, 2).flatten(2).flatten(0, 1)
