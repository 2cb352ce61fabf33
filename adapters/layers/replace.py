"""Shallow copies of a layer, or of a module around it, that run with other weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapters.layers.quantized import Dense, is_bitsandbytes
from adapters.layers.weight import norm_hooks


def substitute(root: nn.Module, module: nn.Module, other: nn.Module) -> nn.Module:
    """A copy of `root` with a module below it, or `root` itself, replaced by another one.

    Only the modules on the path are copied, shallowly. The originals are not touched, so any number of threads may run
    one layer with different weights at once.
    """
    if root is module:
        return other
    for key, child in root._modules.items():
        if child is not None and (changed := substitute(child, module, other)) is not child:
            copy = _shallow(root)
            copy.__dict__["_modules"] = {**root._modules, key: changed}
            return copy
    return root


def with_parameters(layer: nn.Module, values: Mapping[str, Tensor | None]) -> nn.Module:
    """A shallow copy of a layer with other parameters."""
    copy = _shallow(layer)
    copy.__dict__["_parameters"] = {**layer._parameters, **values}
    return copy


def with_weights(layer: nn.Module, weights: Mapping[str, Tensor | None]) -> nn.Module:
    """A shallow copy of a layer with other weights, also where the layer computes its own from others."""
    values = dict(weights)
    computed = layer.parametrizations if parametrize.is_parametrized(layer) else None
    if computed is not None:
        values = {name: values.get(name, getattr(layer, name)) for name in (*cast(nn.ModuleDict, computed), *values)}
    copy = with_parameters(layer, values)
    if computed is not None:
        # The class of a parametrized layer computes its weights; its base class has them as attributes.
        copy.__class__ = type(layer).__bases__[0]
    elif "weight" in values and is_bitsandbytes(layer):
        copy.__class__ = Dense if isinstance(layer, nn.Linear) else nn.Embedding
    dropped = {key for name in values for key in norm_hooks(layer, name)}
    if dropped:
        hooks = {key: hook for key, hook in layer._forward_pre_hooks.items() if key not in dropped}
        copy.__dict__["_forward_pre_hooks"] = hooks
    for name in values:
        copy.__dict__.pop(name, None)
    return copy


def _shallow(module: nn.Module) -> nn.Module:
    copy = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    return copy
