"""Rotations in blocks, as the orthogonal methods share them: parameters, block sizes, products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adapters.errors import TargetError
from adapters.layers.dtypes import widened
from adapters.methods.core.checks import is_integer, is_number, need
from adapters.methods.core.method import Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


def need_blocks(method: Any, usual: int) -> None:
    """Check `block_size` and `blocks`, of which one is given, and make the former `usual` if neither is.

    Raises:
        AdapterError: Both are given, or one is out of its range.
    """
    given = (method.block_size, method.blocks)
    need(all(is_integer(n, 0) for n in given), method, "an integer for block_size or blocks", given)
    need(0 in given, method, "either a block_size or a number of blocks", given)
    if given == (0, 0):
        object.__setattr__(method, "block_size", usual)


def cut(method: Any, spec: WeightSpec, features: int, least: int = 2) -> tuple[int, int]:
    """The number and the size of the blocks of some features.

    Args:
        method: Has `block_size` and `blocks`.
        spec: The weight.
        features: The number of features to rotate.
        least: The least size; a block of one feature has no rotation.

    Raises:
        TargetError: The blocks are not equal, or too small.
    """
    name = "block_size" if method.block_size else "blocks"
    number = getattr(method, name)
    other = features // number
    blocks, size = (other, number) if method.block_size else (number, other)
    if blocks * size != features or size < least:
        raise TargetError(
            f"{spec.path} has {features} features to rotate, which cannot be cut by {name}={number} into equal blocks"
            f" of {least} or more: choose another divisor of {features}, or exclude it."
        )
    return blocks, size


def skew(upper: Tensor) -> Tensor:
    """The skew-symmetric matrices `(..., b, b)` with these `b (b - 1) / 2` elements above the diagonal."""
    size = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2
    rows, columns = torch.triu_indices(size, size, 1, device=upper.device)
    matrix = upper.new_zeros(*upper.shape[:-1], size, size)
    matrix[..., rows, columns] = upper
    return matrix - matrix.mT


def bounded(q: Tensor, bound: float, dim: tuple[int, ...] | None = None) -> Tensor:
    """Matrices with a norm of at most `bound`: the norm over `dim`, by default over all of them together."""
    norm = torch.linalg.vector_norm(q, dim=dim, keepdim=dim is not None)
    return q * (bound / norm.clamp_min(bound))


def cayley(q: Tensor) -> Tensor:
    """The Cayley transform `(I - Q)(I + Q)⁻¹`, a rotation for any skew-symmetric Q; `-Q` gives its transpose.

    It is computed in at least single precision, as there is no solver for less.
    """
    q = widened(q)
    identity = torch.eye(q.shape[-1], device=q.device, dtype=q.dtype)
    return torch.linalg.solve(identity + q, identity - q)  # The two factors commute.


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Features `(..., n b)` in blocks of b, each times its own matrix of `(n, b, b)`; one of `(1, b, b)` is for all."""
    blocks = x.unflatten(-1, (-1, rotations.shape[-1]))
    return torch.einsum("...nb,nbc->...nc", blocks, rotations.to(x.dtype)).flatten(-2)


def butterfly(x: Tensor, rotations: Tensor) -> Tensor:
    """Features `(..., n b)` through one rotation in blocks after the other, of `(factors, n, b, b)`.

    The blocks of the first factor are b neighbours each. A block of factor i has two runs of `b / 2` neighbours, which
    are `2ⁱ` such runs apart: so every feature comes to act on every other, in the end.
    """
    for level, factor in enumerate(rotations):
        if level == 0:
            x = rotate(x, factor)
            continue
        halves = x.unflatten(-1, (-1, 2, 2**level, factor.shape[-1] // 2)).transpose(-3, -2)
        turned = rotate(halves.flatten(-4), factor).view(halves.shape)
        x = turned.transpose(-3, -2).flatten(-4)
    return x


@dataclass(frozen=True)
class OutputRotation(Method):
    """Rotations of the rows of a weight, in blocks of outputs, as LyCORIS has them. The bias stays as it is.

    Args:
        block_size: The size of the blocks, which has to divide the number of outputs; 4 if `blocks` is not given.
        blocks: The number of blocks instead.
        constraint: Keep the rotation near the identity: the norm of all Q together is at most this, times the number
            of outputs. 0 for no bound.
        rescale: Train a factor for each output too.

    Raises:
        AdapterError: A number is out of its range, or both `block_size` and `blocks` are given.
    """

    block_size: int = 0
    blocks: int = 0
    constraint: float = 0.0
    rescale: bool = False

    def __post_init__(self) -> None:
        need_blocks(self, usual=4)
        bound = self.constraint
        need(is_number(bound) and bound >= 0, self, "a constraint of 0 or more", bound)

    def check_spec(self, spec: WeightSpec) -> None:
        self.block_shape(spec)

    def block_shape(self, spec: WeightSpec) -> tuple[int, ...]:
        """The shape of `oft_blocks`."""
        raise NotImplementedError

    def turn(self, y: Tensor, rotations: Tensor) -> Tensor:
        """Outputs `(..., outputs)` turned by rotations of the shape of `oft_blocks`."""
        raise NotImplementedError

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        tensors = {"oft_blocks": spec.zeros(*self.block_shape(spec))}
        if self.rescale:
            kernel = getattr(spec.layer, "kernel_size", ())
            tensors["rescale"] = spec.ones(spec.shape[-2], 1, *(1 for _ in kernel))
        return tensors

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        q = widened(t.oft_blocks - t.oft_blocks.mT)
        if self.constraint:
            q = bounded(q, float(self.constraint) * weight.shape[-2])
        turned = self.turn(weight.mT, cayley(q)).mT
        return turned * t.rescale.view(-1, 1) if self.rescale else turned
