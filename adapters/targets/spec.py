"""Weight specs of targets."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from adapters.errors import TargetError
from adapters.layers.dtypes import is_narrow
from adapters.layers.matrix import Matrix
from adapters.layers.quantized import compute_dtype, is_quantized
from adapters.layers.weight import read_weight
from adapters.methods.core.method import Method
from adapters.methods.core.spec import WeightSpec
from adapters.targets.target import Target


def weight_spec(
    target: Target,
    method: Method,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    uninitialized: bool = False,
) -> WeightSpec:
    """The spec of a target for a method, by default on the device and in the dtype of its weight.

    Args:
        target: The weight.
        method: Says what the weight is as a matrix.
        device: The device of new tensors.
        dtype: Their dtype; by default single precision for a weight that is stored in 8 bits, and the dtype that a
            quantized one computes in.
        uninitialized: Whether the tensors get their values from a file: then the branch is for the base weight,
            whatever other patches do at the moment.

    Raises:
        TargetError: The weight is of a dtype that nothing can be trained in, and no other is given.
    """
    module, parameter, node = target.module, target.parameter, target.node
    read: Callable[[], Tensor | None] = partial(read_weight, module, parameter)
    if node is not None:
        read = partial(node.base_weight if uninitialized else node.effective_weight, parameter)
    holder, weight = _example(target, method)
    if dtype is None and weight is not None:
        dtype = _trained_dtype(target, holder, weight)
    # What a file has is not lost to a model whose weights come later.
    absent = weight is None or (uninitialized and weight.is_meta)
    return WeightSpec(
        target.path,
        module,
        parameter,
        cast(Matrix, method.matrix(module, parameter)),
        torch.device(device or ("cpu" if absent else cast(Tensor, weight).device)),
        dtype or torch.get_default_dtype(),
        read,
        uninitialized,
    )


def _example(target: Target, method: Method) -> tuple[nn.Module, Tensor | None]:
    """The weight that decides device and dtype, and its module: the first one, for a method that adapts blocks."""
    module = target.module
    if not method.mergeable:
        of_all = (
            (part, value) for part in module.modules() for value in part._parameters.values() if value is not None
        )
        return next(of_all, (module, None))
    weight = module._parameters.get(target.parameter)
    return module, read_weight(module, target.parameter) if weight is None else weight


def _trained_dtype(target: Target, holder: nn.Module, weight: Tensor) -> torch.dtype:
    """The dtype to train in beside a weight."""
    if is_quantized(weight):
        return compute_dtype(holder, weight)
    if not (weight.is_floating_point() or weight.is_complex()):
        raise TargetError(f"{target.path} has a weight of {weight.dtype}, no dtype to train in: pass dtype=.")
    return torch.float32 if is_narrow(weight.dtype) else weight.dtype
