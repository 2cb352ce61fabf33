"""Low-rank matrices of convolutions, whose kernel may have a small tensor of its own."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adapters.methods.core.spec import WeightSpec


def channels(spec: WeightSpec) -> int:
    """The number of inputs of a weight for each position of the kernel."""
    return spec.shape[-1] // math.prod(spec.kernel)


def has_core(spec: WeightSpec, wanted: bool) -> bool:
    """Whether a product for this weight gets a core, if wanted: only a kernel of several positions needs one."""
    return wanted and math.prod(spec.kernel) > 1


def product(a: Tensor, b: Tensor, core: Tensor | None = None) -> Tensor:
    """A matrix `(outputs, inputs)` of low rank.

    Args:
        a: `(outputs, rank)`, or `(rank, outputs)` where there is a core.
        b: `(rank, inputs)`, or `(rank, channels)` where there is a core.
        core: `(rank, rank, *kernel)`, the core of a Tucker decomposition, which mixes ranks at each position.
    """
    if core is None:
        return a @ b
    return torch.einsum("pqk,po,qc->ock", core.flatten(2), a, b).flatten(1)
