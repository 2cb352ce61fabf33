"""VeRA: low-rank updates that differ only in two vectors, between random matrices that all layers share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from adapters.methods.core.checks import need_number, need_rank, need_seed
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class VeRA(LowRank):
    """Vector-based random matrix adaptation.

    `A` and `B` have the size of the largest layer, and each layer uses the first columns of `A` and the first
    rows of `B`. They are never trained, exist once for all layers, and are equal for equal `rank`, `seed` and
    layers; files hold them nevertheless, so that they do not depend on torch's generators.

    Args:
        rank: Rows of A and columns of B.
        seed: The random seed of A and B.
        d_initial: Initial `d`; `b` is zero at first.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.VeRA(rank=64))
        >>> print(patch.num_parameters())
        >>> patch.save_pretrained("vera")
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

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        *stack, outputs, _ = spec.shape
        return {
            "vera_lambda_b": spec.zeros(*stack, outputs),
            "vera_lambda_d": spec.zeros(*stack, self.rank).fill_(self.d_initial),
        }

    def shared_shapes(self, specs: Sequence[WeightSpec]) -> dict[str, tuple[int, ...]]:
        outputs, inputs = largest(specs)
        return {"vera_A": (self.rank, inputs), "vera_B": (outputs, self.rank)}

    def shared(self, specs: Sequence[WeightSpec]) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        empty = {
            name: torch.empty(shape, dtype=torch.float32, device="cpu")
            for name, shape in self.shared_shapes(specs).items()
        }
        return {
            name: nn.init.kaiming_uniform_(tensor, generator=generator).to(specs[0].device, specs[0].dtype)
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
    """B and A, cut to the size of one layer."""
    outputs, inputs = t.shape[-2:]
    return t.vera_B[:outputs], t.vera_A[:, :inputs]


def largest(specs: Sequence[WeightSpec]) -> tuple[int, int]:
    """The largest number of outputs, and of inputs, of some weights."""
    return max(spec.shape[-2] for spec in specs), max(spec.shape[-1] for spec in specs)
