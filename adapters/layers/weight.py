"""Reading the weights of a layer, computed and quantized ones too."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

from adapters.layers.kinds import CONVOLUTIONS, is_conv1d
from adapters.layers.quantized import dequantized, is_bitsandbytes, is_quantized

# Layers known to compute a linear function of their weight and nothing else.
_PLAIN_FORWARDS = {layer.forward for layer in (nn.Linear, *CONVOLUTIONS, nn.Embedding)}


def is_plain(layer: nn.Module) -> bool:
    """Whether the output of a layer is a linear function of its weight, so that updates add up in the output."""
    forward = type(layer).forward
    if not (
        forward in _PLAIN_FORWARDS
        or (is_conv1d(layer) and forward.__qualname__ == "Conv1D.forward")
        or (is_bitsandbytes(layer) and isinstance(layer, nn.Linear))
    ):
        return False
    return _is_parameter(layer, "weight") and getattr(layer, "max_norm", None) is None


def is_stored(layer: nn.Module, parameter: str) -> bool:
    """Whether a weight is a dense parameter of its layer, be it None, rather than computed from others or quantized."""
    return _is_parameter(layer, parameter) and not is_quantized(layer._parameters[parameter])


def _is_parameter(layer: nn.Module, parameter: str) -> bool:
    if parameter not in layer._parameters:
        return False
    return not (layer._forward_pre_hooks and norm_hooks(layer, parameter))


def read_weight(layer: nn.Module, parameter: str) -> Tensor:
    """A weight of a layer, computed or dequantized where it is parametrized or quantized; None for an absent bias."""
    if layer._forward_pre_hooks:
        for hook in norm_hooks(layer, parameter).values():
            return cast(Tensor, hook.compute_weight(layer))
    stored = layer._parameters.get(parameter)  # Past nn.Module.__getattr__, which is slow.
    if is_quantized(stored):
        return dequantized(layer, cast(Tensor, stored))
    return cast(Tensor, getattr(layer, parameter)) if stored is None else stored


def is_norm_source(layer: nn.Module, parameter: str) -> bool:
    """Whether a hook computes a weight of the layer from this parameter."""
    return parameter.endswith(("_g", "_v", "_orig")) and bool(norm_hooks(layer, parameter.rpartition("_")[0]))


def norm_hooks(layer: nn.Module, parameter: str) -> dict[int, Any]:
    """The hooks of `torch.nn.utils.weight_norm` and `spectral_norm` that compute a weight before each call."""
    return {
        key: hook
        for key, hook in layer._forward_pre_hooks.items()
        if hasattr(hook, "compute_weight") and getattr(hook, "name", None) == parameter
    }
