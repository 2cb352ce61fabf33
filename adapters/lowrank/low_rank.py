"""`LowRank`, an update of a weight as two factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters.errors import LayerMismatchError


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The update `scale · up @ down` of a weight.

    Attributes:
        up: `(outputs, rank)`, B of LoRA; with the experts in front for a stack.
        down: `(rank, inputs)`, A of LoRA; with the experts in front for a stack.
        scale: The factor of the product.
        dropout: The probability of dropping each input of `down`.

    Raises:
        LayerMismatchError: The factors have different ranks.

    Example:
        >>> update = LowRank(torch.randn(6, 2), torch.randn(2, 4), scale=0.5)
        >>> update.matrix().shape, update.truncated(rank=1).rank
        (torch.Size([6, 4]), 1)
    """

    up: Tensor
    down: Tensor
    scale: float = 1.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.up.shape[-1] != self.down.shape[-2]:
            shapes = f"{tuple(self.up.shape)} and {tuple(self.down.shape)}"
            raise LayerMismatchError(f"The factors of a low-rank update have shapes {shapes}: their ranks must agree.")

    @classmethod
    def full(cls, matrix: Tensor) -> LowRank:
        """A matrix of any rank, with the identity on its smaller side."""
        *stack, outputs, inputs = matrix.shape
        size = min(outputs, inputs)
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device).expand(*stack, size, size)
        return cls(identity, matrix) if outputs < inputs else cls(matrix, identity)

    @classmethod
    def join(cls, updates: Sequence[LowRank]) -> LowRank:
        """The sum of updates without dropout, of the ranks of all of them: `[s₁ up₁, s₂ up₂, …] @ [down₁; down₂; …]`.

        Updates of one scale keep it as the scale of the sum, and one alone is returned as it is.
        """
        if len(updates) == 1:
            return updates[0]
        ups, scale = [update.up for update in updates], updates[0].scale
        if any(update.scale != scale for update in updates):
            ups, scale = [update.up * update.scale for update in updates], 1.0
        return cls(torch.cat(ups, -1), torch.cat([update.down for update in updates], -2), scale)

    @property
    def rank(self) -> int:
        """The inner dimension of the product, which the rank of the matrix does not exceed."""
        return self.down.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the matrix."""
        return (*self.up.shape[:-1], self.down.shape[-1])

    def matrix(self) -> Tensor:
        """The product, `(outputs, inputs)`, with the experts in front for a stack."""
        matrix = self.up @ self.down
        return matrix if self.scale == 1 else matrix * self.scale

    def scaled(self, factor: float) -> LowRank:
        """The update times a number."""
        return self if factor == 1 else replace(self, scale=self.scale * factor)

    def to(self, dtype: torch.dtype) -> LowRank:
        """The update with factors of a dtype."""
        if self.up.dtype is dtype is self.down.dtype:
            return self
        return replace(self, up=self.up.to(dtype), down=self.down.to(dtype))

    def is_finite(self) -> bool:
        """Whether neither factor has a NaN or an infinity."""
        return bool(self.up.isfinite().all()) and bool(self.down.isfinite().all())

    def norm(self) -> float:
        """The Frobenius norm, from the triangles `R` of QR decompositions of the factors."""
        up, down = (torch.linalg.qr(factor, mode="r").R for factor in (self.up, self.down.mT))
        return abs(self.scale) * float(torch.linalg.vector_norm(up @ down.mT))

    def error(self, of: LowRank) -> float:
        """The relative error `‖self - of‖ / ‖of‖` in the Frobenius norm; 0 where `of` is zero."""
        size = of.norm()
        return LowRank.join((self, of.scaled(-1.0))).norm() / size if size else 0.0

    def truncated(self, rank: int | None = None, energy: float | None = None) -> LowRank:
        """The nearest update of at most a rank, or of the least rank that keeps a share of the squared norm.

        It is the truncated singular value decomposition: with `up = Q R` and `downᵀ = P S`, that of the small `R Sᵀ`,
        between `Q` and `Pᵀ`, is that of `up @ down`.

        Args:
            rank: The largest rank.
            energy: The share of the squared Frobenius norm to keep.
        """
        (left, first), (right, second) = torch.linalg.qr(self.up), torch.linalg.qr(self.down.mT)
        u, singular, vt = torch.linalg.svd(first @ second.mT, full_matrices=False)
        inner = LowRank.of_svd(u, singular, vt, rank, energy)
        return replace(self, up=left @ inner.up, down=inner.down @ right.mT)

    @classmethod
    def of_svd(cls, u: Tensor, singular: Tensor, vt: Tensor, rank: int | None, energy: float | None) -> LowRank:
        """The first columns and rows of a singular value decomposition, with `√σ` in each factor.

        In halves, for the sake of dtypes of low precision.
        """
        exact = 16 * torch.finfo(u.dtype).eps
        needed = _needed_rank(singular, exact if energy is None else max(exact, math.sqrt(1 - energy)))
        kept = needed if rank is None else min(rank, needed)
        root = singular[..., :kept].sqrt()
        return cls(u[..., :kept] * root.unsqueeze(-2), root.unsqueeze(-1) * vt[..., :kept, :])


def _needed_rank(singular: Tensor, tolerance: float) -> int:
    """The number of singular values, at least 1, that leave a remainder of a relative norm below a tolerance."""
    squares = singular.to("cpu", torch.float64).square()
    tails = squares.flip(-1).cumsum(-1).flip(-1).sqrt()  # The norms of the remainders without the first ones.
    return max(1, int((tails > tolerance * tails[..., :1]).sum(-1).max()))
