"""Weights with branches merged into them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from adapters.layers.dtypes import widened
from adapters.layers.sharded import gather, shard_like
from adapters.lowrank.accumulate import _MATRIX_UNIT, Product, add
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.method import Active, Branch


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


Made = dict[object, "nn.Parameter | None"]
"""Weights with branches folded in, by what they were made of."""


def adapted_weights(own: Mapping[str, Tensor | None], active: Active) -> dict[str, Tensor | None]:
    """What weights become by some branches, in their own dtypes, computed in at least single precision.

    Those in parts are made whole for it, as no formula of a method has to know of parts, and are parted again.
    """
    touched = dict.fromkeys(name for branch, _ in active for name in branch.names)
    wide = {name: None if (weight := own[name]) is None else widened(gather(weight)) for name in touched}
    for branch, scale in active:
        wide = branch.change(wide, scale)
    dtype = next((weight.dtype for weight in own.values() if weight is not None), None)  # For a bias where none was.
    weights = dict(own)
    for name, result in wide.items():
        like = own[name]
        if result is not None:
            result = result.to(dtype) if like is None else shard_like(result.to(like.dtype), like)
        weights[name] = result
    return weights


def _merged(own: Mapping[str, Tensor | None], active: Active) -> dict[str, Tensor | None]:
    """The same in new tensors: where that can be done in place, to the bit what it makes of weights in place."""
    merged: dict[str, Tensor | None] = {}
    for name, weight in own.items():
        added = [item for item in active if name in item[0].names]
        plain = type(weight) in (Tensor, nn.Parameter) and all(is_low_rank(branch, name) for branch, _ in added)
        if weight is None or not plain or not weight.is_floating_point():
            return adapted_weights(own, active)
        merged[name] = result = weight.detach().clone(memory_format=torch.contiguous_format)
        add(result, products_of(added, weight))
    return merged


def _parameter(value: Tensor | None, like: Tensor | None) -> nn.Parameter | None:
    return None if value is None else nn.Parameter(value.contiguous(), like is not None and like.requires_grad)
