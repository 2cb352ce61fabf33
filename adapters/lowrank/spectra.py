"""Updates of weights as matrices: their singular values, their sizes, and what two of them have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_EXACT = 1024  # The smaller side up to which all singular values of a full matrix are computed.
_LEADING = 64  # How many are computed beyond it.
_DIRECTIONS = 16  # How many directions of an update are compared.
_ZERO = 1e-6  # Singular values below this share of the largest are taken for rounding errors.


@dataclass(frozen=True)
class Update:
    """What is added to a weight, as a matrix or as two factors.

    Attributes:
        up: `(outputs, rank)`, or the whole matrix if there is no `down`; with the experts in front for a stack.
        down: `(rank, inputs)`.
    """

    up: Tensor
    down: Tensor | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return tuple(self.up.shape if self.down is None else (*self.up.shape[:-1], self.down.shape[-1]))

    def matrix(self) -> Tensor:
        """`(outputs, inputs)`, with the experts in front for a stack."""
        return self.up if self.down is None else self.up @ self.down

    def is_finite(self) -> bool:
        """Whether there is no NaN and no infinity in it."""
        return all(bool(part.isfinite().all()) for part in (self.up, self.down) if part is not None)


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of an update, without its right side.

    Attributes:
        norm: The Frobenius norm.
        values: Singular values from the largest on. A stack counts as the block-diagonal matrix of its experts.
        complete: Whether these are all that are not zero, rather than the largest.
        left: The directions in the space of outputs that belong to the largest, `(outputs, directions)`, with the
            experts in front for a stack.
    """

    norm: float
    values: tuple[float, ...]
    complete: bool
    left: Tensor

    @classmethod
    def of(cls, update: Update) -> Spectrum:
        """That of an update; the matrix of two factors is not made.

        With `up = Q R` and `downᵀ = P S`, the singular values are those of the small `R Sᵀ`. Of a large full matrix the
        leading ones are found by a randomised projection (arXiv:0909.4061), always by the same one.
        """
        if update.down is not None:
            (left, first), (_, second) = torch.linalg.qr(update.up), torch.linalg.qr(update.down.mT)
            small, singular, _ = torch.linalg.svd(first @ second.mT, full_matrices=False)
            left, complete = left @ small[..., :_DIRECTIONS], True
        else:
            complete = min(update.up.shape[-2:]) <= _EXACT
            if complete:
                left, singular, _ = torch.linalg.svd(update.up, full_matrices=False)
            else:
                with torch.random.fork_rng(devices=[]):
                    torch.default_generator.manual_seed(0)  # That of other devices is left as it is.
                    left, singular, _ = torch.svd_lowrank(update.up, q=_LEADING, niter=4)
            left = left[..., :_DIRECTIONS]
        values = singular.double().flatten().sort(descending=True).values
        norm = float(torch.linalg.vector_norm(values if complete else update.up.float()))
        kept = values[values > _ZERO * values[:1]]
        rank = int((singular > _ZERO * singular.amax(-1, keepdim=True)).sum(-1).max())
        return cls(norm, tuple(kept.tolist()), complete, left[..., :rank])

    @property
    def effective_rank(self) -> float | None:
        """`exp(-Σ pᵢ log pᵢ)` with `pᵢ = σᵢ / Σ σ` (Roy and Vetterli, 2007); None where not all values are known."""
        if not self.complete:
            return None
        if not self.values:
            return 0.0
        total = math.fsum(self.values)
        return math.exp(-math.fsum(p * math.log(p) for p in (value / total for value in self.values)))

    @property
    def stable_rank(self) -> float:
        """`‖D‖² / σ₁²` (Rudelson and Vershynin, 2007); 0 for nothing at all."""
        return (self.norm / self.values[0]) ** 2 if self.values else 0.0


def inner(a: Update, b: Update) -> float:
    """`Σ aᵢⱼ bᵢⱼ`, from the factors of both where they have some."""
    if a.down is not None and b.down is not None:
        # tr((U D)ᵀ V E) = Σ (Uᵀ V) ∘ (D Eᵀ)
        return float(((a.up.mT @ b.up) * (a.down @ b.down.mT)).sum())
    return float((a.matrix().double() * b.matrix().double()).sum())


def shared_directions(a: Spectrum, b: Spectrum) -> tuple[float, float] | None:
    """How much of the leading directions that two updates write into is the same.

    `‖Aᵀ B‖² / k` for orthonormal bases of the `k` leading left singular vectors of each: 0 for subspaces that are
    orthogonal to each other, 1 for the same one. That is φ of LoRA's section 7.2 (arXiv:2106.09685) with `i = j = k`,
    where `k` is the smaller rank, at most 16. Also what it is on average for random subspaces, `k / outputs`.

    Returns:
        Both; None where one of them has no direction.
    """
    k = min(a.left.shape[-1], b.left.shape[-1])
    if not k:
        return None
    product = a.left[..., :k].mT.double() @ b.left[..., :k].double()
    return float(product.square().sum((-2, -1)).mean()) / k, k / a.left.shape[-2]
