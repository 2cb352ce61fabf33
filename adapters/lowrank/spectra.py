"""Singular-value spectra of updates: norms, ranks, and the subspaces that two updates share."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.lowrank.low_rank import LowRank

_EXACT = 1024  # The smaller side up to which all singular values of a full matrix are computed.
_LEADING = 64  # The number of leading ones that are computed beyond it.
_DIRECTIONS = 16  # The number of leading left singular vectors that are compared.
_ZERO = 1e-6  # Singular values below this share of the largest count as rounding errors.


Update = LowRank | Tensor
"""An update of a weight: low-rank, or as a matrix `(outputs, inputs)`, with the experts in front for a stack."""


def is_finite(update: Update) -> bool:
    """Whether an update has neither a NaN nor an infinity."""
    return update.is_finite() if isinstance(update, LowRank) else bool(update.isfinite().all())


@dataclass(frozen=True)
class Spectrum:
    """The singular value decomposition of an update, without its right side.

    Attributes:
        norm: The Frobenius norm.
        values: Singular values in descending order. A stack counts as the block-diagonal matrix of its experts.
        complete: Whether these are all that are not zero, rather than the leading ones.
        left: The leading left singular vectors, `(outputs, directions)`, with the experts in front for a stack.
    """

    norm: float
    values: tuple[float, ...]
    complete: bool
    left: Tensor

    @classmethod
    def of(cls, update: Update) -> Spectrum:
        """The spectrum of an update; the matrix of a low-rank one is not made.

        With `up = Q R` and `downᵀ = P S`, the singular values are those of the small `R Sᵀ`. Of a large full matrix the
        leading ones are found by a randomised projection (arXiv:0909.4061), always by the same one.
        """
        norm: Tensor | None = None
        if isinstance(update, LowRank):
            (left, first), (_, second) = torch.linalg.qr(update.up), torch.linalg.qr(update.down.mT)
            small, singular, _ = torch.linalg.svd(first @ second.mT, full_matrices=False)
            left, singular = left @ small[..., :_DIRECTIONS], singular * abs(update.scale)
        elif min(update.shape[-2:]) <= _EXACT:
            left, singular, _ = torch.linalg.svd(update, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(0)  # That of other devices is left as it is.
                left, singular, _ = torch.svd_lowrank(update, q=_LEADING, niter=4)
            norm = torch.linalg.vector_norm(update.float())
        values = singular.double().flatten().sort(descending=True).values
        kept = values[values > _ZERO * values[:1]]
        rank = int((singular > _ZERO * singular.amax(-1, keepdim=True)).sum(-1).max())
        directions = left[..., : min(rank, _DIRECTIONS)]
        return cls(
            float(torch.linalg.vector_norm(values) if norm is None else norm),
            tuple(kept.tolist()),
            norm is None,
            directions,
        )

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
    """The Frobenius inner product `Σ aᵢⱼ bᵢⱼ`; of two low-rank updates, from their factors."""
    if isinstance(a, LowRank) and isinstance(b, LowRank):
        # tr((U D)ᵀ V E) = Σ (Uᵀ V) ∘ (D Eᵀ)
        return a.scale * b.scale * float(((a.up.mT @ b.up) * (a.down @ b.down.mT)).sum())
    one, other = (update.matrix() if isinstance(update, LowRank) else update for update in (a, b))
    return float((one.double() * other.double()).sum())


def shared_directions(a: Spectrum, b: Spectrum) -> tuple[float, float] | None:
    """The similarity of the leading output subspaces of two updates, and its expectation for random ones.

    It is `‖Aᵀ B‖² / k` for orthonormal bases of the `k` leading left singular vectors of each: 0 for orthogonal
    subspaces, 1 for the same one. That is φ of LoRA's section 7.2 (arXiv:2106.09685) with `i = j = k`, where `k` is the
    smaller rank, at most 16. The expectation is `k / outputs`.

    Returns:
        Both, or None where one of them is zero.
    """
    k = min(a.left.shape[-1], b.left.shape[-1])
    if not k:
        return None
    product = a.left[..., :k].mT.double() @ b.left[..., :k].double()
    return float(product.square().sum((-2, -1)).mean()) / k, k / a.left.shape[-2]
