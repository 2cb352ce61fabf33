"""`nearest`, the low-rank update nearest to a matrix, by a randomised singular value decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from adapters.lowrank.low_rank import LowRank

_OVERSAMPLING = 8  # Columns beyond the rank that is wanted, and rounds of power iteration: both as the paper advises.
_ROUNDS = 2
_FIRST = 16  # Columns to begin with where the rank is not known.
_SQUARED = 0.9999  # The share of the energy up to which the squares of singular values are precise enough.


def nearest(
    matrix: Tensor, rank: int | None = None, energy: float | None = None, generator: torch.Generator | None = None
) -> LowRank:
    """An update near to a matrix, of about the error of `LowRank.truncated`, which decomposes the whole matrix.

    The columns of `Q` span the image of a few random vectors, and `Q (Qᵀ matrix)` is close to the matrix (Halko,
    Martinsson and Tropp, arXiv:0909.4061, algorithms 4.2 and 4.4). Where the rank is not known, columns are added until
    they keep enough of the energy, by `‖matrix‖² = ‖Qᵀ matrix‖² + ‖matrix - Q Qᵀ matrix‖²`.

    Args:
        matrix: `(outputs, inputs)`, with the experts in front for a stack.
        rank: The largest rank.
        energy: The share of the squared Frobenius norm to keep.
        generator: The source of the random vectors, on the CPU.
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
    if energy is not None:  # A larger share of the energy in these columns.
        energy = min(1.0, float((energy * whole / kept.clamp(min=torch.finfo(torch.float64).tiny)).max()))
    return LowRank(basis, inner).truncated(rank, energy)


def _columns(inner: Tensor, missing: Tensor) -> int:
    """The least number of columns for a missing energy, where none has more than the columns already found."""
    energies = torch.linalg.eigvalsh(inner @ inner.mT).to(torch.float64)
    largest = energies[..., energies.shape[-1] // 4]  # The smallest ones are inaccurate.
    return int((missing / largest.clamp(min=torch.finfo(torch.float64).tiny)).max().clamp(0, max(inner.shape)))


def _whole(matrix: Tensor, rank: int | None, energy: float | None) -> LowRank:
    """The nearest update by a decomposition of the whole matrix, for where most of the rank is needed.

    For a share of the energy the eigenvectors of `matrix matrixᵀ` do, in half of the time. The energy they keep is
    measured, so that the loss of small values by squaring costs one rank at most.
    """
    if energy is None or energy > _SQUARED:
        u, singular, vt = torch.linalg.svd(matrix, full_matrices=False)
        return LowRank.of_svd(u, singular, vt, rank, energy)
    if matrix.shape[-2] > matrix.shape[-1]:
        transposed = _whole(matrix.mT, rank, energy)
        return LowRank(transposed.down.mT, transposed.up.mT)
    basis = torch.linalg.eigh(matrix @ matrix.mT).eigenvectors.flip(-1)
    inner = basis.mT @ matrix
    norms = torch.linalg.vector_norm(inner, dim=-1)
    rows = inner / norms.clamp(min=torch.finfo(norms.dtype).tiny).unsqueeze(-1)
    return LowRank.of_svd(basis, norms, rows, rank, energy)


def _range(matrix: Tensor, basis: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Orthonormal columns, orthogonal to a basis, that span most of the range of a matrix outside of its span."""
    shape = (*matrix.shape[:-2], matrix.shape[-1], count)
    columns = matrix @ torch.randn(shape, generator=generator, dtype=matrix.dtype).to(matrix.device)
    for _ in range(_ROUNDS):
        columns = matrix @ torch.linalg.qr(matrix.mT @ _orthonormal(columns, basis)).Q
    return _orthonormal(columns, basis)


def _orthonormal(columns: Tensor, basis: Tensor) -> Tensor:
    """Orthonormal columns that span the given ones, projected off a basis."""
    for _ in range(2):  # Twice is enough (Parlett): once leaves rounding errors of large components.
        columns = torch.linalg.qr(columns - basis @ (basis.mT @ columns)).Q
    return columns
