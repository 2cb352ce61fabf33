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
    layer: Target,
    method: Method,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    own: bool = False,
) -> WeightSpec:
    """The spec of a target for a method, by default on the device and in the dtype of its weight.

    Args:
        layer: The layer and the name of the weight.
        method: Says what the weight is as a matrix.
        device: Where the tensors go.
        dtype: Their dtype; by default single precision for a layer that is stored in 8 bits, and for one that is
            quantised what it computes in.
        own: Whether the branch is from a file: for the layer's own weight, whatever other patches do at the
            moment, and with values of its own.
    """
    module, parameter = layer.module, layer.parameter
    node = layer.node
    read: Callable[[], Tensor | None] = partial(read_weight, module, parameter)
    if node is not None:
        read = partial(node.own_weight if own else node.effective, parameter)
    holder, weight = module, module._parameters.get(parameter)
    if not method.mergeable:
        of_all = ((part, own) for part in module.modules() for own in part._parameters.values() if own is not None)
        holder, weight = next(of_all, (module, None))
    elif weight is None:
        weight = cast("nn.Parameter | None", read_weight(module, parameter))
    if dtype is None and is_quantized(weight):
        dtype = compute_dtype(holder, cast(Tensor, weight))
    if dtype is None and weight is not None and not (weight.is_floating_point() or weight.is_complex()):
        raise TargetError(f"{layer.path} has a weight of {weight.dtype}, no dtype to train in: pass dtype=.")
    if dtype is None and weight is not None:
        dtype = torch.float32 if is_narrow(weight.dtype) else weight.dtype
    # What a file has is not lost to a model whose weights come later.
    absent = weight is None or (own and weight.is_meta)
    return WeightSpec(
        layer.path,
        module,
        parameter,
        cast(Matrix, method.matrix(module, parameter)),
        torch.device(device or ("cpu" if absent else cast(Tensor, weight).device)),
        dtype or torch.get_default_dtype(),
        read,
        own,
    )
