"""C3A: circulant blocks, which hold no more numbers than one of their rows, are added to the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - as everyone calls it

from adapters.errors import TargetError
from adapters.layers.dtypes import widened
from adapters.methods.core.checks import is_integer, need
from adapters.methods.core.formulas import MatrixFree
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class C3A(MatrixFree):
    """Circular convolution adaptation.

    Args:
        block_size: The size of the blocks, which has to divide both the outputs and the inputs.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.C3A(block_size=4))
        >>> patch.merge()
        >>> patch.save_pretrained("c3a")
    """

    key = "c3a"
    paper = "arXiv:2407.19342"
    formula = "W + C / inputs, with C in blocks of C[i, j] = w[(j - i) mod b]"

    block_size: int = 256

    def __post_init__(self) -> None:
        size = self.block_size
        need(is_integer(size, 1), self, "a block_size that is an integer of 1 or more", size)

    def check_spec(self, spec: WeightSpec) -> None:
        outputs, inputs = spec.shape
        if outputs % self.block_size or inputs % self.block_size:
            raise TargetError(
                f"{spec.path} has {outputs} outputs and {inputs} inputs, which block_size={self.block_size} does not"
                " divide: choose a common divisor, or exclude it."
            )

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        outputs, inputs = spec.shape
        return {"c3a_kernel": spec.zeros(outputs // self.block_size, inputs // self.block_size, self.block_size)}

    def delta(self, t: Tensors) -> Tensor:
        places = torch.arange(self.block_size, device=t.c3a_kernel.device)
        blocks = t.c3a_kernel[..., (places - places.unsqueeze(-1)) % self.block_size]
        return blocks.transpose(1, 2).reshape(t.shape) / t.shape[-1]

    def product(self, x: Tensor, t: Tensors) -> Tensor:
        """`Δ x` by Fourier transforms, which make a circulant matrix diagonal; an empty input has none."""
        if not x.numel():
            return F.linear(x, self.delta(t))
        kernel = torch.fft.rfft(widened(t.c3a_kernel) / t.shape[-1]).conj()
        blocks = torch.fft.rfft(widened(x).unflatten(-1, (-1, self.block_size)))
        return torch.fft.irfft(torch.einsum("...jf,ijf->...if", blocks, kernel), n=self.block_size).flatten(-2)
