"""Adding low-rank updates to weights in place, in little more than the time to read and to write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from adapters.branch import Branch
from adapters.choice import Active
from adapters.forms import LowRank
from adapters.layers import widened

Product = tuple[Tensor, Tensor, float]
"""Two factors and a strength: what is added to the rows of a weight, with the experts in front for a stack."""

_MATRIX_UNIT = torch.cpu.get_capabilities().get("amx_bf16", False) if hasattr(torch.cpu, "get_capabilities") else False
# Numbers that are changed at once: as many as stay in the cache of the processor, and what multiplies is quick with.
_AT_ONCE = 1 << (17 if _MATRIX_UNIT else 20)


def is_low_rank(branch: Branch, parameter: str) -> bool:
    """Whether all that becomes of a parameter is that the product of two factors is added to it."""
    method = branch.method
    own = isinstance(method, LowRank) and type(method).change is LowRank.change
    return own and branch.parameter == parameter and branch.matrix.layout != "transposed"


def products_of(active: Active, weight: Tensor) -> list[Product]:
    """What such branches add to a weight like this one, in at least single precision."""
    dtype = widened(weight[:0]).dtype
    products: list[Product] = []
    for branch, scale in active:
        up, down = cast(LowRank, branch.method).factors(branch.values(dtype))
        products.append((down.mT, up.mT, scale) if branch.matrix.layout == "columns" else (up, down, scale))
    in_one = _MATRIX_UNIT and weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
    return [_in_bfloat16(products)] if in_one else products


def _in_bfloat16(products: Sequence[Product]) -> Product:
    """The same as one product in bfloat16, for processors that multiply that in hardware and add up in float32.

    Each number becomes a sum of three, which together have the 24 bits of float32, and of their nine products those
    three are left out that are below its precision.
    """
    ups, downs, scales = zip(*products, strict=True)
    a, b, c = _thirds(torch.cat([up * scale for up, scale in zip(ups, scales, strict=True)], -1))
    d, e, f = _thirds(torch.cat(downs, -2))
    return torch.cat((a, a, a, b, b, c), -1), torch.cat((d, e, f, d, e, d), -2), 1.0


def _thirds(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    first = x.bfloat16()
    second = (x - first).bfloat16()
    return first, second, (x - first - second).bfloat16()


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
