"""RandLoRA: full-rank updates out of random low-rank bases that all layers share, with trained diagonals between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.errors import TargetError
from adapters.methods.core.checks import alpha_of, need, need_alpha, need_rank, need_seed
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors
from adapters.methods.vera import largest


@dataclass(frozen=True)
class RandLoRA(LowRank):
    """Full-rank adaptation by random bases.

    The bases `B` and `A` are as large as the largest layer needs, never trained, and exist once for all layers. There
    are as many of `B` as make the update full-rank, and one `A`. Where a weight has fewer outputs than inputs, the
    update is the transpose of the formula.

    Args:
        rank: The rank of each base. The smaller it is, the more is trained.
        alpha: The strength. The update is scaled by `alpha / rank`.
        seed: The random seed of the bases.
        sparse: Make two of three values of the bases zero, and the others 1 or -1, up to a factor.
        very_sparse: Make all but one of `√n` zero, with `n` the shorter side of the largest layer.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.RandLoRA(rank=8))
        >>> print(patch.num_parameters())
        >>> patch.save_pretrained("randlora")
    """

    key = "randlora"
    paper = "arXiv:2502.00987"
    formula = "W + s Σᵢ Bᵢ diag(λᵢ) A diag(γᵢ), with s = alpha / rank"
    kinds = frozenset({"linear", "convolution", "stack"})
    plus_lr = frozenset({"randlora_lambda"})

    rank: int = 32
    alpha: float | None = 640.0
    seed: int = 0
    sparse: bool = False
    very_sparse: bool = False

    def __post_init__(self) -> None:
        need_rank(self)
        need_alpha(self)
        need_seed(self)
        for name in ("sparse", "very_sparse"):
            need(isinstance(getattr(self, name), bool), self, f"{name} to be true or false", getattr(self, name))

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        *stack, outputs, inputs = spec.shape
        short = min(outputs, inputs)
        bases = math.ceil(short / self.rank)
        return {
            "randlora_lambda": spec.zeros(*stack, self.rank, bases),
            "randlora_gamma": spec.ones(*stack, bases, short) / max(bases, short),
        }

    def shared_shapes(self, specs: Sequence[WeightSpec]) -> dict[str, tuple[int, ...]]:
        short, long = sorted(largest(specs))
        return {"randlora_A": (self.rank, 1, short), "randlora_B": (long, math.ceil(short / self.rank), self.rank)}

    def shared(self, specs: Sequence[WeightSpec]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        of_a, of_b = self.shared_shapes(specs).values()
        if self.sparse or self.very_sparse:
            share = 1 / (math.sqrt(of_a[-1]) if self.very_sparse else 3)
            a, b = _signs(of_a, share, generator), _signs(of_b, share, generator)
        else:
            a = _uniform(of_a, generator)
            long, bases, _ = of_b
            b = torch.cat([_uniform((long, 1, self.rank), generator) for _ in range(bases)], dim=1)
        if not all(base.numel() > 1 and base.std() > 0 for base in (a, b)):
            raise TargetError(
                f"The values of a base of {type(self).__name__} are all equal at rank={self.rank} and"
                f" seed={self.seed}: choose another seed, or a larger rank."
            )
        return {
            name: (base / base.std()).to(specs[0].device, specs[0].dtype)
            for name, base in (("randlora_A", a), ("randlora_B", b))
        }

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        outputs, inputs = t.shape[-2:]
        bases, short = t.randlora_gamma.shape[-2:]
        # The columns of B come base by base, the scaled rows of A row by row, and file formats count on that: each
        # column meets another row than in the formula, and all of them are random.
        long = t.randlora_B[: max(outputs, inputs), :bases].flatten(1)
        scaled = (t.randlora_lambda * self.scaling).unsqueeze(-1) * t.randlora_gamma.unsqueeze(-3)
        rows = (scaled * t.randlora_A[..., :short]).flatten(-3, -2)
        columns = long.expand(*rows.shape[:-2], *long.shape)
        return (columns, rows) if inputs <= outputs else (rows.mT, columns.mT)

    @property
    def scaling(self) -> float:
        """`s` of the formula."""
        return alpha_of(self) / self.rank


def _uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    # The generator gives other numbers in other dtypes, and bfloat16 is what files without the bases count on.
    empty = torch.empty(shape, dtype=torch.bfloat16, device="cpu")
    return nn.init.kaiming_uniform_(empty, a=math.sqrt(5), generator=generator)


def _signs(shape: tuple[int, ...], share: float, generator: torch.Generator) -> Tensor:
    """Zeros, but for a share of values that are 1 or -1 with equal probability."""
    chance = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
    return (chance > 1 - share / 2).float() - (chance < share / 2).float()
