"""Adding low-rank updates to weights in place: no second copy of a model, and little more than the time to add them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from adapters.adapted import Adapted, base_modules
from adapters.branch import Branch
from adapters.choice import Active
from adapters.forms import LowRank
from adapters.layers import is_narrow

Product = tuple[Tensor, Tensor, float]
"""Two factors and a strength: what is added to the rows of a weight, with the experts in front for a stack."""

_AT_ONCE = 1 << 19  # numbers that are changed at once, so that they stay in the cache of the processor


@dataclass
class Fold:
    """What is to be added to one weight."""

    weight: nn.Parameter
    products: list[Product]


def holders(model: nn.Module) -> Counter[int]:
    """How many modules of a model hold each memory that parameters are in."""
    stored = (parameter for module in base_modules(model) for parameter in module._parameters.values())
    return Counter(_memory(parameter) for parameter in stored if type(parameter) is nn.Parameter)


def _memory(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage()._cdata


def is_low_rank(branch: Branch, parameter: str) -> bool:
    """Whether all that becomes of a parameter is that the product of two factors is added to it."""
    method = branch.method
    own = isinstance(method, LowRank) and type(method).change is LowRank.change
    return own and branch.parameter == parameter and branch.matrix.layout != "transposed"


def product_of(branch: Branch, scale: float, dtype: torch.dtype) -> Product:
    """What such a branch adds at a strength, in a dtype."""
    up, down = cast(LowRank, branch.method).factors(branch.values(dtype))
    return (down.mT, up.mT, scale) if branch.matrix.layout == "columns" else (up, down, scale)


def fold_of(node: Adapted, branches: Active, held: Counter[int]) -> Fold | None:
    """What these branches add to their weight, if nothing else has its memory and it can be added in place."""
    name = branches[0][0].parameter
    weight = node.base._parameters.get(name)
    if (
        node.merged
        or type(weight) is not nn.Parameter
        or held[_memory(weight)] != 1
        or weight.is_meta
        or weight.is_inference()
        or not weight.is_floating_point()
        or is_narrow(weight.dtype)
        or not weight.is_contiguous()
        or not all(is_low_rank(branch, name) and branch.names == (name,) for branch, _ in branches)
    ):
        return None
    wide = torch.promote_types(weight.dtype, torch.float32)
    return Fold(weight, [product_of(branch, scale, wide) for branch, scale in branches])


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
