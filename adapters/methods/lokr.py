"""LoKr: the Kronecker product of two small matrices is added to the weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import TargetError
from adapters.methods.core.checks import alpha_of, is_integer, need, need_alpha, need_rank
from adapters.methods.core.decomposed import WeightDecomposed
from adapters.methods.core.formulas import MatrixFree
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors
from adapters.methods.core.tucker import channels, has_core, product


@dataclass(frozen=True)
class LoKr(MatrixFree):
    """Low-rank Kronecker product: each entry of the first factor scales one block of the update.

    The second factor is itself a product of low rank, unless it is so small that this would not make it smaller.

    Args:
        rank: The rank of the factors that are decomposed.
        alpha: The strength, `rank` when it is None. The update is scaled by `alpha / rank`, whether or not a factor is
            decomposed.
        factor: The number of rows and columns of the first factor where it divides the outputs or the inputs of the
            weight, else the next smaller divisor; -1 for about as many as the second factor. Or exactly
            `(rows, columns)`.
        decompose_both: Decompose the first factor too, if that makes it smaller.
        tucker: Give the second factor of a convolution a core for the kernel when it is decomposed.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.LoKr(rank=4, factor=4))
        >>> patch.merge()
        >>> patch.save_pretrained("lokr.safetensors", format="lycoris")
    """

    key = "lokr"
    paper = "arXiv:2309.14859"
    formula = "W + s w₁ ⊗ w₂, with s = alpha / rank"

    rank: int = 8
    alpha: float | None = None
    factor: int | tuple[int, int] = -1
    decompose_both: bool = False
    tucker: bool = False

    def __post_init__(self) -> None:
        need_rank(self)
        need_alpha(self)
        numbers = self.factor if isinstance(self.factor, tuple) and len(self.factor) == 2 else (self.factor,)
        at_hand = self.factor == -1 or all(is_integer(number, 1) for number in numbers)
        need(at_hand, self, "a factor that is -1, an integer of 1 or more, or a tuple of two of these", self.factor)

    def check_spec(self, spec: WeightSpec) -> None:
        rows, columns = self._first(spec)
        if spec.shape[0] % rows or channels(spec) % columns:
            raise TargetError(
                f"{spec.path} has {spec.shape[0]} outputs and {channels(spec)} inputs, which {rows} rows and {columns}"
                f" columns do not divide: give it a {type(self).__name__} with factor=-1."
            )

    def _first(self, spec: WeightSpec) -> tuple[int, int]:
        """The shape of the first factor."""
        if isinstance(self.factor, tuple):
            return self.factor
        return divisor(spec.shape[0], self.factor), divisor(channels(spec), self.factor)

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        rows, columns = self._first(spec)
        outputs, inputs = spec.shape[0] // rows, channels(spec) // columns
        rank = self.rank
        if self.decompose_both and rank < max(rows, columns) / 2:
            first = {"lokr_w1_a": spec.zeros(rows, rank), "lokr_w1_b": spec.uniform(rank, columns)}
        else:
            first = {"lokr_w1": spec.zeros(rows, columns)}
        if rank >= max(outputs, inputs) / 2:
            return {**first, "lokr_w2": spec.uniform(outputs, inputs, *spec.kernel)}
        if has_core(spec, self.tucker):
            return {
                **first,
                "lokr_w2_a": spec.uniform(rank, outputs),
                "lokr_w2_b": spec.uniform(rank, inputs),
                "lokr_t2": spec.uniform(rank, rank, *spec.kernel),
            }
        return {
            **first,
            "lokr_w2_a": spec.uniform(outputs, rank),
            "lokr_w2_b": spec.uniform(rank, inputs * math.prod(spec.kernel)),
        }

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        """The two matrices whose Kronecker product is added, the first one scaled."""
        first = t.lokr_w1 if "lokr_w1" in t else t.lokr_w1_a @ t.lokr_w1_b
        second = t.lokr_w2.flatten(1) if "lokr_w2" in t else product(t.lokr_w2_a, t.lokr_w2_b, t.get("lokr_t2"))
        return first * (alpha_of(self) / self.rank), second

    def delta(self, t: Tensors) -> Tensor:
        return torch.kron(*self.factors(t))

    def product(self, x: Tensor, t: Tensors) -> Tensor:
        """`(w₁ ⊗ w₂) x` is `w₁ X w₂ᵀ`, where X has the inputs in rows."""
        first, second = self.factors(t)
        rows = x.unflatten(-1, (first.shape[1], second.shape[1]))
        return torch.einsum("...ij,pi,qj->...pq", rows, first, second).flatten(-2)


@dataclass(frozen=True)
class DoKr(WeightDecomposed):
    """Weight-decomposed LoKr, as LyCORIS has it. For its arguments see `LoKr` and `WeightDecomposed`.

    Example:
        >>> patch = adapters.inject(model, adapters.DoKr(rank=4))
        >>> patch.merge()
        >>> patch.save_pretrained("dokr.safetensors", format="lycoris")
    """

    key = "dokr"
    paper = LoKr.paper
    formula = "m V / ‖V‖ for each row, with V = W + s w₁ ⊗ w₂"
    adds = LoKr

    rank: int = 8
    alpha: float | None = None
    factor: int | tuple[int, int] = -1
    decompose_both: bool = False
    tucker: bool = False
    on_inputs: bool = False


def divisor(size: int, factor: int) -> int:
    """`factor` where it divides a size; else the largest divisor that is neither above it nor above the square root."""
    if factor > 0 and size % factor == 0:
        return factor
    limit = math.isqrt(size) if factor < 0 else min(factor, math.isqrt(size))
    return next(number for number in range(limit, 0, -1) if size % number == 0)
