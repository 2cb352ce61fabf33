"""OFT: the input, or the output, of a layer is rotated in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters.layers.dtypes import widened
from adapters.layers.matrix import Matrix
from adapters.methods.core.arithmetic import Scale, lerp
from adapters.methods.core.checks import is_integer, is_number, need
from adapters.methods.core.formulas import InputTransform
from adapters.methods.core.method import Branch
from adapters.methods.core.rotations import OutputRotation, bounded, cayley, cut, need_blocks, rotate, skew
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class OFT(InputTransform):
    """Orthogonal fine-tuning (OFTv2, arXiv:2506.19847): rotated inputs, or the rotated rows of an embedding.

    Args:
        block_size: The size of the blocks, which has to divide the number of inputs; 32 if `blocks` is not given.
        blocks: The number of blocks instead.
        coft: Keep each rotation near the identity: the norm of its Q is at most `eps / √(number of Qs)`.
        eps: The bound of `coft`.
        block_share: One rotation for all blocks.
        cayley_neumann: Approximate R without a solver, by a few terms of the series of the Cayley transform; it is
            orthogonal only for small Q. As PEFT's files have it, R then turns the other way than without.
        num_terms: The number of terms: 2 for `I + 2 Q`; more for `I + 2 Q + ... + 2 Qⁿ⁻¹ + Qⁿ`, with
            `n = num_terms - 1`, but at least 3.

    Raises:
        AdapterError: A number is out of its range, or both `block_size` and `blocks` are given.

    Example:
        >>> patch = adapters.inject(model, adapters.OFT(block_size=8))
        >>> patch.merge()
        >>> patch.save_pretrained("oft")
    """

    key = "oft"
    paper = "arXiv:2306.07280"
    formula = "W Rᵀ, with R = (I - Q)(I + Q)⁻¹ in blocks, Q skew-symmetric"
    kinds = frozenset({"linear", "convolution", "embedding"})

    block_size: int = 0
    blocks: int = 0
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    cayley_neumann: bool = True
    num_terms: int = 5

    def __post_init__(self) -> None:
        need_blocks(self, usual=32)
        need(is_number(self.eps) and self.eps > 0, self, "an eps of more than 0", self.eps)
        terms = self.num_terms
        need(is_integer(terms, 2), self, "a num_terms that is an integer of 2 or more", terms)

    def check_spec(self, spec: WeightSpec) -> None:
        cut(self, spec, self._features(spec))

    def _features(self, spec: WeightSpec) -> int:
        """The number of features that are rotated: inputs, or the outputs of an embedding, whose inputs are ids."""
        return spec.shape[-2] if spec.matrix.kind == "embedding" else spec.shape[-1]

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        blocks, size = cut(self, spec, self._features(spec))
        return {"oft_R": spec.zeros(1 if self.block_share else blocks, size * (size - 1) // 2)}

    def rotations(self, upper: Tensor) -> Tensor:
        """R of each block, from the elements of Q above the diagonal."""
        q = skew(widened(upper))
        if self.coft:
            q = bounded(q, self.eps / math.sqrt(len(q)), dim=(-2, -1))
        return neumann(q, self.num_terms) if self.cayley_neumann else cayley(q)

    def map(self, x: Tensor, t: Tensors, transposed: bool) -> Tensor:
        rotations = self.rotations(t.oft_R)
        return rotate(x, rotations.mT if transposed else rotations)

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        if t.matrix.kind == "embedding":
            return self.map(weight.mT, t, transposed=False).mT
        return super().update(weight, t)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return matrix.kind != "convolution"

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if branch.matrix.kind != "embedding":
            return super().run(branch, layer, scale, x, *args, **kwargs)
        rows: Tensor = layer(x, *args, **kwargs)
        features = branch.cast(rows)
        rotated = self.map(features, branch.values(), transposed=False)
        return lerp(features, rotated, scale).to(rows.dtype)

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        name = "oft_embedding_R" if branch.matrix.kind == "embedding" else "oft_R"
        return {name: branch.tensors()["oft_R"]}


def neumann(q: Tensor, terms: int) -> Tensor:
    """The transpose of `cayley(q)` for small q: terms of `I + 2 ∑ Qⁿ`, the last in half if there are powers."""
    series = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype) + 2 * q
    if terms == 2:
        return series
    power = q
    for _ in range(2, max(terms - 1, 3)):
        power = power @ q
        series = series + 2 * power
    return series + power @ q


@dataclass(frozen=True)
class DiagOFT(OutputRotation):
    """OFT of the outputs, as LyCORIS and kohya's scripts have it. For its arguments see `OutputRotation`.

    Example:
        >>> patch = adapters.inject(model, adapters.DiagOFT(block_size=8))
        >>> patch.merge()
        >>> patch.save_pretrained("oft.safetensors", format="lycoris")
    """

    key = "diag-oft"
    paper = "arXiv:2306.07280"
    formula = "diag(s) Rᵀ W, with R = (I + Q)(I - Q)⁻¹ in blocks, Q = B - Bᵀ"

    def block_shape(self, spec: WeightSpec) -> tuple[int, ...]:
        blocks, size = cut(self, spec, spec.shape[-2], least=1)
        return blocks, size, size

    def turn(self, y: Tensor, rotations: Tensor) -> Tensor:
        return rotate(y, rotations.mT)
