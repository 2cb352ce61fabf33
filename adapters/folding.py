"""Adding low-rank updates to weights in place: no second copy of a model, and little more than the time to add them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.adapted import Active, Adapted, base_modules
from adapters.forms import LowRank
from adapters.layers import Matrix, is_narrow

Product = tuple[Tensor, Tensor, float]
"""Factors, `(outputs, rank)` and `(rank, inputs)`, with the experts in front for a stack, and a strength."""


@dataclass
class Fold:
    """What is to be added to one weight.

    Attributes:
        weight: The parameter.
        matrix: What it is as a matrix.
        products: What is added.
    """

    weight: nn.Parameter
    matrix: Matrix
    products: list[Product]


def holders(model: nn.Module) -> Counter[int]:
    """How many modules of a model hold each memory that parameters are in."""
    stored = (parameter for module in base_modules(model) for parameter in module._parameters.values())
    return Counter(_memory(parameter) for parameter in stored if type(parameter) is nn.Parameter)


def _memory(parameter: nn.Parameter) -> int:
    return parameter.untyped_storage()._cdata


def fold_of(node: Adapted, branches: Active, held: Counter[int]) -> Fold | None:
    """What these branches add to their weight, if nothing else has its memory and it can be added in place."""
    first = branches[0][0]
    weight = node.base._parameters.get(first.parameter)
    if (
        node.merged
        or type(weight) is not nn.Parameter
        or held[_memory(weight)] != 1
        or weight.is_meta
        or weight.is_inference()
        or not weight.is_floating_point()
        or is_narrow(weight.dtype)
        or not weight.is_contiguous()
        or first.matrix.layout == "transposed"
    ):
        return None
    products = []
    for branch, scale in branches:
        method = branch.method
        if not (isinstance(method, LowRank) and method.additive and branch.names == (first.parameter,)):
            return None
        up, down = method.factors(branch.values(torch.promote_types(weight.dtype, torch.float32)))
        products.append((up, down, scale))
    return Fold(weight, first.matrix, products)


@torch.no_grad()
def add(folds: Iterable[Fold]) -> None:
    """Add what is to be added, in at least single precision: a weight of fewer bits goes through one buffer for all."""
    buffer = torch.empty(0)
    for fold in folds:
        wide = torch.promote_types(fold.weight.dtype, torch.float32)
        if fold.weight.dtype == wide:
            _add_products(fold.matrix.read(fold.weight), fold.products)
            continue
        if (buffer.dtype, buffer.device) != (wide, fold.weight.device) or len(buffer) < fold.weight.numel():
            buffer = torch.empty(fold.weight.numel(), dtype=wide, device=fold.weight.device)
        weight = buffer[: fold.weight.numel()].view(fold.weight.shape).copy_(fold.weight)
        _add_products(fold.matrix.read(weight), fold.products)
        fold.weight.copy_(weight)


def _add_products(matrix: Tensor, products: Sequence[Product]) -> None:
    for up, down, scale in products:
        (matrix.baddbmm_ if matrix.ndim == 3 else matrix.addmm_)(up, down, alpha=scale)
