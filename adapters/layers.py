"""How layers use their weights: which matrix a weight is, how a layer runs with another one, which rows it has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from adapters.quantized import Dense, dequantized, is_bitsandbytes, is_quantized, logical_shape

# A recurrent network keeps its weights a second time, in one flat buffer that its kernels read.
UNSUPPORTED = (nn.RNNBase, nn.RNNCellBase)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# The output projection of torch's attention, which reads its weight and does not call it.
ATTENTION_PARTS = nn.modules.linear.NonDynamicallyQuantizableLinear

# Layers known to compute a linear function of their weight and nothing else.
_PLAIN_FORWARDS = {layer.forward for layer in (nn.Linear, *CONVOLUTIONS, nn.Embedding)}


@dataclass(frozen=True)
class Matrix:
    """A weight seen as a matrix of outputs by inputs.

    Attributes:
        shape: `(outputs, inputs)`, or `(experts, outputs, inputs)` for a stack of matrices.
        layout: How the weight holds it: `"rows"`, one flattened row per output; `"columns"`, its transpose; `"as is"`;
            `"transposed"`, as a transposed convolution does.
        kind: What the layer does with it: `"linear"`, `"convolution"`, `"embedding"`, `"stack"` of several matrices,
            or `"any"` where that is of no interest.
        groups: Groups of a convolution: as many parts of the rows have other inputs.
    """

    shape: tuple[int, ...]
    layout: str
    kind: str
    groups: int = 1

    @classmethod
    def whole(cls, layer: nn.Module, parameter: str) -> Matrix | None:
        """A parameter of any shape as it is, or None where there is none that can be adapted."""
        if isinstance(layer, UNSUPPORTED) or _is_source(layer, parameter):
            return None
        weight = layer._parameters.get(parameter)
        if weight is None and hasattr(layer, parameter):
            weight = cast(nn.Parameter, read_weight(layer, parameter))
        return cls(tuple(logical_shape(weight)), "as is", "any") if isinstance(weight, Tensor) else None

    @classmethod
    def of(cls, layer: nn.Module, parameter: str) -> Matrix | None:
        """How a layer uses a parameter, or None where that cannot be adapted."""
        if isinstance(layer, UNSUPPORTED):
            return None
        if parameter != "weight":
            bare = layer._parameters.get(parameter)
            if bare is None or bare.ndim not in (2, 3):
                return None
            return cls(tuple(bare.shape), "as is", "stack" if bare.ndim == 3 else "linear")
        if isinstance(layer, nn.Linear):
            return _matrix((layer.out_features, layer.in_features), "rows", "linear")
        if isinstance(layer, nn.Embedding):
            return _matrix((layer.embedding_dim, layer.num_embeddings), "columns", "embedding")
        if isinstance(layer, CONVOLUTIONS):
            inputs = layer.in_channels // layer.groups * torch.Size(layer.kernel_size).numel()
            return _matrix((layer.out_channels, inputs), "rows", "convolution", layer.groups)
        if isinstance(layer, TRANSPOSED):
            inputs = layer.in_channels // layer.groups * torch.Size(layer.kernel_size).numel()
            return cls((layer.out_channels, inputs), "transposed", "convolution", layer.groups)
        if is_conv1d(layer):
            inputs, outputs = cast(Tensor, layer.weight).shape
            return _matrix((outputs, inputs), "columns", "linear")
        return None

    def read(self, weight: Tensor) -> Tensor:
        """The matrix that a weight holds."""
        if self.layout == "columns":
            return weight.T
        if self.layout == "transposed":
            # (inputs, outputs / groups, ...): each group of inputs has outputs of its own.
            return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        return weight if self.layout == "as is" else weight.flatten(1)

    def write(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The weight that holds a matrix, of the shape of another weight."""
        if self.layout == "columns":
            return matrix.T
        if self.layout == "transposed":
            inputs = like.shape[0] // self.groups
            grouped = matrix.unflatten(0, (self.groups, -1)).unflatten(2, (inputs, *like.shape[2:]))
            return grouped.transpose(1, 2).flatten(0, 1)
        return matrix.view_as(like)


# Models have few different ones, and each is asked for several times.
_matrix = lru_cache(maxsize=1024)(Matrix)


def widened(tensor: Tensor) -> Tensor:
    """A tensor in at least single precision."""
    return tensor.to(torch.float32 if is_narrow(tensor.dtype) else torch.promote_types(tensor.dtype, torch.float32))


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether numbers are of 8 bits or fewer, which are for storage: torch does not calculate with them."""
    return dtype.is_floating_point and dtype.itemsize == 1


class Conv1D(nn.Module):
    """The place of transformers' Conv1D in a model of which only the names and the shapes are known."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, device="meta"))
        self.bias = nn.Parameter(torch.empty(outputs, device="meta"))


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, a Linear with its weight transposed."""
    return isinstance(layer, Conv1D) or any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(layer).__mro__
    )


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


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    """The buffers of a layer that a state dict has, by name."""
    left_out = layer._non_persistent_buffers_set
    return {name: buffer for name, buffer in layer._buffers.items() if buffer is not None and name not in left_out}


def features_dim(layer: nn.Module) -> int:
    """The dimension of a layer's output that has the rows of its matrix."""
    return -1 - len(layer.kernel_size) if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else -1


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor among what a module takes or gives: itself, or one in a tuple, a list or a mapping."""
    if isinstance(values, Tensor):
        return values
    values = values.values() if isinstance(values, Mapping) else values
    return next((value for value in values if isinstance(value, Tensor)), None)


def with_first_tensor(values: Any, tensor: Tensor) -> Any:
    """What a module gives with another first tensor; the original is not changed."""
    if isinstance(values, Tensor):
        return tensor
    first = first_tensor(values)
    if isinstance(values, Mapping):
        changed: Any = copy.copy(values)
        changed[next(key for key, value in values.items() if value is first)] = tensor
        return changed
    return rebuilt(values, [tensor if value is first else value for value in values])


def rebuilt(values: Any, parts: list[Any]) -> Any:
    """A tuple or a list of the kind of another one."""
    return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """What a layer multiplies by the transpose of its matrix, one row after the other, for an input of the layer."""
    if not isinstance(layer, CONVOLUTIONS):
        return x.flatten(0, -2)
    dims = len(layer.kernel_size)
    x = x if x.ndim == dims + 2 else x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = functional.pad(x, layer._reversed_padding_repeated_twice, mode)
    for dim, geometry in enumerate(zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2):
        size, stride, dilation = geometry
        x = x.unfold(dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    # (batch, groups, channels of one, *positions, *kernel), the kernel and the channels last.
    x = x.unflatten(1, (layer.groups, -1)).movedim(2, -1 - dims)
    return x.flatten(-1 - dims).flatten(0, -2)


def is_stored(layer: nn.Module, parameter: str) -> bool:
    """Whether a weight is a parameter of its layer, be it None, rather than computed from others or from codes."""
    return _is_parameter(layer, parameter) and not is_quantized(layer._parameters[parameter])


def _is_parameter(layer: nn.Module, parameter: str) -> bool:
    if parameter not in layer._parameters:
        return False
    return not (layer._forward_pre_hooks and _norm_hooks(layer, parameter))


def read_weight(layer: nn.Module, parameter: str) -> Tensor:
    """A weight of a layer, computed where it is parametrised or quantised; None for a bias that is not there."""
    if layer._forward_pre_hooks:
        for hook in _norm_hooks(layer, parameter).values():
            return cast(Tensor, hook.compute_weight(layer))
    stored = layer._parameters.get(parameter)  # Past nn.Module.__getattr__, which is slow.
    if is_quantized(stored):
        return dequantized(layer, cast(Tensor, stored))
    return cast(Tensor, getattr(layer, parameter)) if stored is None else stored


def _is_source(layer: nn.Module, parameter: str) -> bool:
    """Whether a parameter is what a hook computes a weight from."""
    return parameter.endswith(("_g", "_v", "_orig")) and bool(_norm_hooks(layer, parameter.rpartition("_")[0]))


def _norm_hooks(layer: nn.Module, parameter: str) -> dict[int, Any]:
    """The hooks of `torch.nn.utils.weight_norm` and `spectral_norm`, which compute a weight before each call."""
    return {
        key: hook
        for key, hook in layer._forward_pre_hooks.items()
        if hasattr(hook, "compute_weight") and getattr(hook, "name", None) == parameter
    }


def substitute(root: nn.Module, module: nn.Module, other: nn.Module) -> nn.Module:
    """`root` with another module in the place of one below it, or of itself.

    Only the modules on the way are copied, and these share everything else. The originals are not touched, so any
    number of threads may run one layer with different weights at once.
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
    """A layer with other parameters, which shares everything else."""
    copy = _shallow(layer)
    copy.__dict__["_parameters"] = {**layer._parameters, **values}
    return copy


def with_weights(layer: nn.Module, weights: Mapping[str, Tensor | None]) -> nn.Module:
    """A layer that runs with other weights, be they computed or not, and shares everything else."""
    values = dict(weights)
    computed = layer.parametrizations if parametrize.is_parametrized(layer) else None
    if computed is not None:
        values = {name: values.get(name, getattr(layer, name)) for name in (*cast(nn.ModuleDict, computed), *values)}
    copy = with_parameters(layer, values)
    if computed is not None:
        # The class made for a parametrised layer computes its weights; the class below it just has them.
        copy.__class__ = type(layer).__bases__[0]
    elif "weight" in values and is_bitsandbytes(layer):
        copy.__class__ = Dense if isinstance(layer, nn.Linear) else nn.Embedding
    dropped = {key for name in values for key in _norm_hooks(layer, name)}
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
