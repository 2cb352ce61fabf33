"""Low-rank updates that can be added in place to the weights of a model, so that there is no second copy of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from adapters.adapter import base_modules
from adapters.layers.dtypes import is_narrow
from adapters.lowrank.low_rank import LowRank
from adapters.methods.core.method import Active
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.runtime.merged_weights import is_low_rank, updates_of


@dataclass
class InPlace:
    """Updates to be added to one weight."""

    weight: nn.Parameter
    updates: list[LowRank]


def memory_users(model: nn.Module) -> Counter[int]:
    """The number of modules of a model that have parameters in a memory, for each such memory."""
    stored = (parameter for module in base_modules(model) for parameter in module._parameters.values())
    return Counter(_memory(parameter) for parameter in stored if type(parameter) is nn.Parameter)


def _memory(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage()._cdata


def in_place(node: AdaptedLayer, branches: Active, users: Counter[int]) -> InPlace | None:
    """The updates that branches add to their weight, if nothing else has its memory and it can be written in place."""
    name = branches[0][0].parameter
    weight = node.base._parameters.get(name)
    if (
        node.merged
        or type(weight) is not nn.Parameter
        or users[_memory(weight)] != 1
        or weight.is_meta
        or weight.is_inference()
        or not weight.is_floating_point()
        or is_narrow(weight.dtype)
        or not weight.is_contiguous()
        or not all(is_low_rank(branch, name) and branch.names == (name,) for branch, _ in branches)
    ):
        return None
    return InPlace(weight, updates_of(branches, weight))
