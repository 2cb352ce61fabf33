"""Kinds of layers: linear, convolutions, transposed, unsupported; and the geometry of their inputs and outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

# A recurrent network has its weights a second time, in one flat buffer that its kernels read.
UNSUPPORTED = (nn.RNNBase, nn.RNNCellBase)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

# The output projection of torch's attention, which reads its weight and does not call it.
ATTENTION_PARTS = nn.modules.linear.NonDynamicallyQuantizableLinear


class Conv1D(nn.Module):
    """A stand-in for transformers' Conv1D in a skeleton."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(inputs, outputs, device="meta"))
        self.bias = nn.Parameter(torch.empty(outputs, device="meta"))


def is_conv1d(layer: nn.Module) -> bool:
    """Whether a layer is transformers' Conv1D, a Linear with its weight transposed."""
    return isinstance(layer, Conv1D) or any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(layer).__mro__
    )


def buffers(layer: nn.Module) -> dict[str, Tensor]:
    """The persistent buffers of a layer by name."""
    left_out = layer._non_persistent_buffers_set
    return {name: buffer for name, buffer in layer._buffers.items() if buffer is not None and name not in left_out}


def features_dim(layer: nn.Module) -> int:
    """The dimension of the features in the output of a layer."""
    return -1 - len(layer.kernel_size) if isinstance(layer, (*CONVOLUTIONS, *TRANSPOSED)) else -1


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """The rows `x` of `x Wᵀ`, with `W` the matrix of the layer, for an input of the layer: `(rows, inputs)`."""
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
