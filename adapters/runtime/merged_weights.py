"""Weights with branches merged into them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from adapters.layers.dtypes import widened
from adapters.layers.sharded import gather, shard_like
from adapters.lowrank import accumulate
from adapters.lowrank.low_rank import LowRank
from adapters.methods.core import formulas
from adapters.methods.core.method import Active, Branch


def is_low_rank(branch: Branch, parameter: str) -> bool:
    """Whether a branch adds the product of two factors to a parameter, and changes it in no other way."""
    return branch.method.is_low_rank and branch.parameter == parameter and branch.matrix.layout != "transposed"


def updates_of(active: Active, weight: Tensor) -> list[LowRank]:
    """The updates by such branches of a weight like this one, in at least single precision."""
    dtype = widened(weight[:0]).dtype
    updates: list[LowRank] = []
    for branch, scale in active:
        up, down = cast(formulas.LowRank, branch.method).factors(branch.values(dtype))
        if branch.matrix.layout == "columns":
            up, down = down.mT, up.mT
        updates.append(LowRank(up, down, scale))
    in_one = accumulate.MATRIX_UNIT and weight.dtype is torch.bfloat16 and weight.device.type == "cpu"
    return [accumulate.in_bfloat16(updates)] if in_one else updates


Made = dict[object, "nn.Parameter | None"]
"""Merged copies of weights, by the weights and the branches that they were made of."""


def adapted_weights(own: Mapping[str, Tensor | None], active: Active) -> dict[str, Tensor | None]:
    """Weights with branches merged into them, in their own dtypes, computed in at least single precision.

    Sharded ones are gathered for it, so that no formula has to know of shards, and the outcome is sharded alike.
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


def merged_copies(own: Mapping[str, Tensor | None], active: Active) -> dict[str, Tensor | None]:
    """Merged copies of the weights, bit-identical to merging in place where that can be done."""
    merged: dict[str, Tensor | None] = {}
    for name, weight in own.items():
        changing = [item for item in active if name in item[0].names]
        plain = type(weight) in (Tensor, nn.Parameter) and all(is_low_rank(branch, name) for branch, _ in changing)
        if weight is None or not plain or not weight.is_floating_point():
            return adapted_weights(own, active)
        merged[name] = result = weight.detach().clone(memory_format=torch.contiguous_format)
        accumulate.add(result, updates_of(changing, weight))
    return merged


def as_parameter(value: Tensor | None, like: Tensor | None) -> nn.Parameter | None:
    """A weight as a parameter that requires gradients if another one does."""
    return None if value is None else nn.Parameter(value.contiguous(), like is not None and like.requires_grad)
