"""HRA: the inputs of a layer are reflected at a few hyperplanes, one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from adapters.errors import TargetError
from adapters.layers.dtypes import widened
from adapters.methods.core.checks import need_rank
from adapters.methods.core.formulas import InputTransform
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class HRA(InputTransform):
    """Householder reflection adaptation.

    The initial map is the identity if the rank is even, of pairs of reflections that undo each other. An odd number of
    reflections, or orthogonal ones, cannot be the identity: with an odd rank or `gram_schmidt` they are random.

    Args:
        rank: The number of reflections.
        gram_schmidt: Make the vectors orthogonal to each other first.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.HRA(rank=4))
        >>> patch.merge()
        >>> patch.save_pretrained("hra")
    """

    key = "hra"
    paper = "arXiv:2405.17484"
    formula = "W ∏ᵢ (I - 2 uᵢ uᵢᵀ), with uᵢ of length 1"

    rank: int = 8
    gram_schmidt: bool = False

    def __post_init__(self) -> None:
        need_rank(self)

    def check_spec(self, spec: WeightSpec) -> None:
        inputs = spec.shape[-1]
        if self.gram_schmidt and self.rank > inputs:
            raise TargetError(
                f"{spec.path} has {inputs} inputs, so no {self.rank} vectors are orthogonal to each other: choose a"
                f" rank of {inputs} or less, or exclude it."
            )

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        inputs, pairs = spec.shape[-1], not (self.rank % 2 or self.gram_schmidt)
        columns = spec.uniform(inputs, self.rank // 2 if pairs else self.rank, bound=1 / math.sqrt(inputs))
        return {"hra_u": columns.repeat_interleave(2, dim=1) if pairs else columns}

    def map(self, x: Tensor, t: Tensors, transposed: bool) -> Tensor:
        # The product of the reflections is I - U M⁻¹ Uᵀ, where M has the products of the columns of U above the
        # diagonal, and halves of their squares on it.
        u = widened(t.hra_u)
        u = torch.linalg.qr(u).Q if self.gram_schmidt else F.normalize(u, dim=0)
        m = (u.mT @ u).triu(1) + torch.eye(self.rank, device=u.device, dtype=u.dtype) / 2
        up = torch.linalg.solve_triangular(m, u.mT, upper=True).to(x.dtype)
        u = u.to(x.dtype)
        return x - (x @ u) @ up if transposed else x - (x @ up.mT) @ u.mT
