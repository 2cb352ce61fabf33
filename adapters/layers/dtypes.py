"""Dtypes to compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def widened(tensor: Tensor) -> Tensor:
    """A tensor in at least float32."""
    return tensor.to(torch.float32 if is_narrow(tensor.dtype) else torch.promote_types(tensor.dtype, torch.float32))


def is_narrow(dtype: torch.dtype) -> bool:
    """Whether a floating-point dtype has 8 bits or fewer: torch stores such numbers, and does not compute with them."""
    return dtype.is_floating_point and dtype.itemsize == 1
