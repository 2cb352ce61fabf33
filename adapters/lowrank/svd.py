"""Matrices as products `up @ down` of two thin ones: how large they are, how far apart, and the nearest of a rank."""

from __future__ import annotations

import math

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""`up @ down`, of shapes `(outputs, rank)` and `(rank, inputs)`, with the experts in front for a stack."""

_OVERSAMPLING = 8  # Columns beyond the rank that is wanted, and rounds of power iteration: both as the paper advises.
_ROUNDS = 2
_FIRST = 16  # Columns to begin with where the rank is not known.
_SQUARED = 0.9999  # The share of the energy up to which the squares of singular values are precise enough.


def full(matrix: Tensor) -> Factors:
    """A matrix and, on its smaller side, the identity."""
    *stack, outputs, inputs = matrix.shape
    size = min(outputs, inputs)
    identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device).expand(*stack, size, size)
    return (identity, matrix) if outputs < inputs else (matrix, identity)


def reduced(factors: Factors, rank: int | None = None, energy: float | None = None) -> Factors:
    """The nearest factors of at most a rank, or of the least that keeps a share of the energy, the squared norm.

    It is the singular value decomposition, cut off: with `up = Q R` and `downᵀ = P S`, that of the small `R Sᵀ`,
    between `Q` and `Pᵀ`, is that of `up down`.
    """
    up, down = factors
    (left, first), (right, second) = torch.linalg.qr(up), torch.linalg.qr(down.mT)
    u, singular, vt = torch.linalg.svd(first @ second.mT, full_matrices=False)
    up, down = _cut(u, singular, vt, rank, energy)
    return left @ up, down @ right.mT


def _cut(u: Tensor, singular: Tensor, vt: Tensor, rank: int | None, energy: float | None) -> Factors:
    """The first columns and rows of a decomposition, with half of the singular values in each factor.

    By halves, for the sake of dtypes that round much.
    """
    exact = 16 * torch.finfo(u.dtype).eps
    needed = _needed(singular, exact if energy is None else max(exact, math.sqrt(1 - energy)))
    kept = needed if rank is None else min(rank, needed)
    root = singular[..., :kept].sqrt()
    return u[..., :kept] * root.unsqueeze(-2), root.unsqueeze(-1) * vt[..., :kept, :]


def _needed(singular: Tensor, tolerance: float) -> int:
    """How many singular values, 1 at least, make up a matrix but for a part of relative norm below a tolerance."""
    squares = singular.to("cpu", torch.float64).square()
    tails = squares.flip(-1).cumsum(-1).flip(-1).sqrt()  # The norms of what is left without the first ones.
    return max(1, int((tails > tolerance * tails[..., :1]).sum(-1).max()))


def nearest(
    matrix: Tensor, rank: int | None = None, energy: float | None = None, generator: torch.Generator | None = None
) -> Factors:
    """Factors near to a matrix, as `reduced` has the nearest, without a decomposition of all of it if few are enough.

    The columns of `Q` span what the matrix makes of a few random vectors, and `Q (Qᵀ matrix)` is close to it (Halko,
    Martinsson and Tropp, arXiv:0909.4061, algorithms 4.2 and 4.4). Where the rank is not known, columns are added until
    what they keep of the energy is enough, which `‖matrix‖² = ‖Qᵀ matrix‖² + ‖matrix - Q Qᵀ matrix‖²` tells.

    Args:
        matrix: `(outputs, inputs)`, with the experts in front for a stack.
        rank: The largest rank.
        energy: The share of the squared Frobenius norm to keep.
        generator: Where the random vectors come from, on the CPU.
    """
    smaller = min(matrix.shape[-2:])
    most = smaller if rank is None else min(smaller, rank + _OVERSAMPLING)
    if most * 2 > smaller and energy is None:
        return _whole(matrix, rank, energy)  # As quick, and exact.
    whole = matrix.square().sum((-2, -1), dtype=torch.float64)
    basis = matrix.new_empty(*matrix.shape[:-1], 0)
    inner = matrix.new_empty(*matrix.shape[:-2], 0, matrix.shape[-1])
    count = most if energy is None else min(most, _FIRST)
    while True:
        new = _range(matrix, basis, count, generator)
        basis, inner = torch.cat((basis, new), -1), torch.cat((inner, new.mT @ matrix), -2)
        size = basis.shape[-1]
        kept = inner.square().sum((-2, -1), dtype=torch.float64)
        if energy is None or size >= most or bool((kept >= energy * whole).all()):
            break
        least = size + _columns(inner, energy * whole - kept)
        if least * 8 > smaller and most * 2 > smaller:
            return _whole(matrix, rank, energy)
        count = min(max(size, least - size), most - size)
    if energy is not None:  # Of what there is in these columns, that share is more.
        energy = min(1.0, float((energy * whole / kept.clamp(min=torch.finfo(torch.float64).tiny)).max()))
    return reduced((basis, inner), rank, energy)


def _columns(inner: Tensor, missing: Tensor) -> int:
    """How many more columns an energy takes at least, each of which has no more than those that are found have."""
    energies = torch.linalg.eigvalsh(inner @ inner.mT).to(torch.float64)
    largest = energies[..., energies.shape[-1] // 4]  # The very last ones are not found well.
    return int((missing / largest.clamp(min=torch.finfo(torch.float64).tiny)).max().clamp(0, max(inner.shape)))


def _whole(matrix: Tensor, rank: int | None, energy: float | None) -> Factors:
    """The same by a decomposition of all of a matrix, for where most of the rank is needed.

    Where something may be missing the eigenvectors of `matrix matrixᵀ` do, in half of the time. What they keep of
    the energy is counted, so that squaring, which loses what is small, costs a rank at most.
    """
    if energy is None or energy > _SQUARED:
        u, singular, vt = torch.linalg.svd(matrix, full_matrices=False)
        return _cut(u, singular, vt, rank, energy)
    if matrix.shape[-2] > matrix.shape[-1]:
        up, down = _whole(matrix.mT, rank, energy)
        return down.mT, up.mT
    basis = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(-1)
    inner = basis.mT @ matrix
    norms = torch.linalg.vector_norm(inner, dim=-1)
    rows = inner / norms.clamp(min=torch.finfo(norms.dtype).tiny).unsqueeze(-1)
    return _cut(basis, norms, rows, rank, energy)


def _range(matrix: Tensor, basis: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """So many orthonormal columns, at right angles to a basis, that span most of what it does not of a matrix."""
    shape = (*matrix.shape[:-2], matrix.shape[-1], count)
    columns = matrix @ torch.randn(shape, generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(_ROUNDS):
        columns = matrix @ torch.linalg.qr(matrix.mT @ _beside(columns, basis)).Q
    return _beside(columns, basis)


def _beside(columns: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns for those that are given, without what is in the span of a basis."""
    for _ in range(2):  # Twice is enough (Parlett): the first time leaves rounding errors of what was large.
        columns = torch.linalg.qr(columns - basis @ (basis.mT @ columns)).Q
    return columns


def error(factors: Factors, of: Factors) -> float:
    """`‖factors - of‖ / ‖of‖`, and 0 for nothing at all."""
    size = norm(of)
    difference = torch.cat((factors[0], -of[0]), dim=-1), torch.cat((factors[1], of[1]), dim=-2)
    return norm(difference) / size if size else 0.0


def norm(factors: Factors) -> float:
    """`‖up down‖`, in the Frobenius norm, by the triangles that remain of the factors without rotations."""
    up, down = (torch.linalg.qr(factor, mode="r").R for factor in (factors[0], factors[1].mT))
    return float(torch.linalg.vector_norm(up @ down.mT))
