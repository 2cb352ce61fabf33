"""Low-rank updates added to weights in place, in little more than the time to read and to write the weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from adapters.lowrank.low_rank import LowRank

MATRIX_UNIT = torch.cpu.get_capabilities().get("amx_bf16", False) if hasattr(torch.cpu, "get_capabilities") else False
# Elements of a block, which stays in the cache of the processor and is large enough for a fast product.
_BLOCK = 1 << (17 if MATRIX_UNIT else 20)


@torch.no_grad()
def add(rows: Tensor, updates: Sequence[LowRank], first: int = 0) -> None:
    """Add updates to rows of a weight in place, in the precision of the factors.

    Args:
        rows: The rows, or the experts of a stack.
        updates: The updates of the whole weight.
        first: The index of the first row in the weight.
    """
    some = slice(first, first + len(rows))
    if updates[0].up.ndim == 2:
        _add(rows.flatten(1), [replace(update, up=update.up[some]) for update in updates])
        return
    for number, matrix in enumerate(rows, start=first):
        _add(matrix, [replace(update, up=update.up[number], down=update.down[number]) for update in updates])


def _add(matrix: Tensor, updates: Sequence[LowRank]) -> None:
    dtype = updates[0].up.dtype
    if matrix.dtype == dtype:
        for update in updates:
            matrix.addmm_(update.up, update.down, alpha=update.scale)
        return
    count = max(1, _BLOCK // matrix.shape[1])
    scratch = torch.empty(min(count, len(matrix)), matrix.shape[1], dtype=dtype, device=matrix.device)
    for start in range(0, len(matrix), count):
        rows = matrix[start : start + count]
        wide = scratch[: len(rows)].copy_(rows)
        for update in updates:
            wide.addmm_(update.up[start : start + count], update.down, alpha=update.scale)
        rows.copy_(wide)


def in_bfloat16(updates: Sequence[LowRank]) -> LowRank:
    """The sum of updates in bfloat16, exact to float32, for processors with matrix units that accumulate in float32.

    Each number becomes a sum of three, which together have the 24 bits of float32. Of their nine products the three
    below its precision are left out.
    """
    (a, b, c), (d, e, f) = (
        _thirds(torch.cat([update.up * update.scale for update in updates], -1)),
        _thirds(torch.cat([update.down for update in updates], -2)),
    )
    return LowRank(torch.cat((a, a, a, b, b, c), -1), torch.cat((d, e, f, d, e, d), -2))


def _thirds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first = x.bfloat16()
    second = (x - first).bfloat16()
    return first, second, (x - first - second).bfloat16()
