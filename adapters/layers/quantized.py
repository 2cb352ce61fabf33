"""Weights quantized by torchao and bitsandbytes: shapes, dtypes, dequantization. Neither package is imported here."""

from __future__ import annotations

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from adapters.errors import TargetError


def is_quantized(weight: object) -> bool:
    """Whether a parameter is of a class of torchao or bitsandbytes, which knows itself how to dequantize it."""
    return type(weight) is not nn.Parameter and _package(weight) in ("torchao", "bitsandbytes")


def is_bitsandbytes(layer: nn.Module) -> bool:
    """Whether a layer is one of bitsandbytes, whose forward alone can read the weight."""
    return str(getattr(type(layer).forward, "__module__", "")).startswith("bitsandbytes.")


def logical_shape(weight: Tensor) -> torch.Size:
    """The shape of the dequantized weight: bitsandbytes packs numbers of 4 bits in a column of bytes."""
    state = getattr(weight, "quant_state", None) if is_quantized(weight) else None
    return weight.shape if state is None else torch.Size(state.shape)


def compute_dtype(layer: nn.Module, weight: Tensor) -> torch.dtype:
    """The dtype that a layer computes in with its quantized weight.

    It is that of torchao's tensor; the `compute_dtype` of a Linear4bit, or the dtype that it was made of; and float32
    for 8 bits of bitsandbytes, which take inputs of any dtype.
    """
    if weight.is_floating_point():
        return weight.dtype
    state: Any = getattr(weight, "quant_state", None)
    return torch.float32 if state is None else getattr(layer, "compute_dtype", None) or state.dtype


def dequantized(layer: nn.Module, weight: Tensor) -> Tensor:
    """The dequantized weight of a layer, a plain tensor without gradients.

    Raises:
        TargetError: The package cannot dequantize this kind of tensor.
    """
    weight = weight.detach()
    if _package(weight) == "torchao":
        if type(weight).dequantize is Tensor.dequantize:
            raise TargetError(
                f"A {type(weight).__name__} of torchao cannot be dequantized, which methods other than those that run"
                " beside a layer need: choose LoRA, or another quantization."
            )
        return cast(Tensor, cast(Any, weight).dequantize())
    source: Any = layer._parameters["weight"]
    codes = weight.as_subclass(Tensor)
    if codes.is_floating_point():  # Not quantized yet.
        return codes
    state = getattr(source, "quant_state", None)
    if state is None:
        scales = cast(Any, layer).state.SCB if getattr(source, "SCB", None) is None else source.SCB
        return codes * (scales.view(-1, 1) / 127)
    operations: Any = sys.modules["bitsandbytes"].functional
    if getattr(state, "packing_format_for_cpu", False):
        # Packed at the first use in evaluation mode, for a kernel that alone reads it: exactly, by the identity.
        identity = torch.eye(state.shape[1], dtype=torch.bfloat16)
        matrix = operations.gemv_4bit(identity, codes, state=state).T
    else:
        matrix = operations.dequantize_4bit(codes, state)
    return cast(Tensor, matrix).to(compute_dtype(layer, source))


class Dense(nn.Linear):
    """A layer of bitsandbytes with a dense weight, which also takes inputs of any dtype."""

    def forward(self, input: Tensor) -> Tensor:
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return functional.linear(input.to(dtype), self.weight, bias).to(input.dtype)


def _package(value: object) -> str:
    return type(value).__module__.partition(".")[0]
