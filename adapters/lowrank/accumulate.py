"""Adding low-rank updates to weights in place, in little more than the time to read and to write them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Product = tuple[Tensor, Tensor, float]
"""Two factors and a strength: what is added to the rows of a weight, with the experts in front for a stack."""

_MATRIX_UNIT = torch.cpu.get_capabilities().get("amx_bf16", False) if hasattr(torch.cpu, "get_capabilities") else False
# Numbers that are changed at once: as many as stay in the cache of the processor, and what multiplies is quick with.
_AT_ONCE = 1 << (17 if _MATRIX_UNIT else 20)


@torch.no_grad()
def add(rows: Tensor, products: Sequence[Product], first: int = 0) -> None:
    """Add products to rows of a weight in place, in the precision of the factors.

    Args:
        rows: The rows, or the experts.
        products: What is added to the whole weight.
        first: The number of the first row.
    """
    some = slice(first, first + len(rows))
    if products[0][0].ndim == 2:
        _add(rows.flatten(1), [(up[some], down, scale) for up, down, scale in products])
        return
    for number, matrix in enumerate(rows, start=first):
        _add(matrix, [(up[number], down[number], scale) for up, down, scale in products])


def _add(matrix: Tensor, products: Sequence[Product]) -> None:
    dtype = products[0][0].dtype
    if matrix.dtype == dtype:
        for up, down, scale in products:
            matrix.addmm_(up, down, alpha=scale)
        return
    count = max(1, _AT_ONCE // matrix.shape[1])
    scratch = torch.empty(min(count, len(matrix)), matrix.shape[1], dtype=dtype, device=matrix.device)
    for start in range(0, len(matrix), count):
        rows = matrix[start : start + count]
        wide = scratch[: len(rows)].copy_(rows)
        for up, down, scale in products:
            wide.addmm_(up[start : start + count], down, alpha=scale)
        rows.copy_(wide)
