"""LoHa: the elementwise product of two matrices of low rank is added to the weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adapters.methods.core.checks import alpha_of, need_alpha, need_rank
from adapters.methods.core.decomposed import WeightDecomposed
from adapters.methods.core.formulas import Additive
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors
from adapters.methods.core.tucker import channels, has_core, product


@dataclass(frozen=True)
class LoHa(Additive):
    """Low-rank Hadamard product, FedPara: an update of a rank up to the square of `rank`.

    Args:
        rank: Columns of A₁ and A₂, and rows of B₁ and B₂.
        alpha: The strength, `rank` when it is None. The update is scaled by `alpha / rank`.
        tucker: Give both products of a convolution a core for the kernel (Proposition 3 of the paper), so that they
            need fewer numbers. Kernels of size 1 need none.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.LoHa(rank=4))
        >>> patch.merge()
        >>> patch.save_pretrained("loha.safetensors", format="lycoris")
    """

    key = "loha"
    paper = "arXiv:2108.06098"
    formula = "W + s (A₁ B₁) ∘ (A₂ B₂), with s = alpha / rank"

    rank: int = 8
    alpha: float | None = None
    tucker: bool = False

    def __post_init__(self) -> None:
        need_rank(self)
        need_alpha(self)

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        outputs, inputs = spec.shape
        rank = self.rank
        if has_core(spec, self.tucker):
            a, b = (rank, outputs), (rank, channels(spec))
            cores = {name: spec.uniform(rank, rank, *spec.kernel) for name in ("hada_t1", "hada_t2")}
        else:
            a, b, cores = (outputs, rank), (rank, inputs), {}
        return {
            "hada_w1_a": spec.uniform(*a),
            "hada_w1_b": spec.uniform(*b),
            "hada_w2_a": spec.uniform(*a),
            "hada_w2_b": spec.zeros(*b),
            **cores,
        }

    def delta(self, t: Tensors) -> Tensor:
        first = product(t.hada_w1_a, t.hada_w1_b, t.get("hada_t1"))
        second = product(t.hada_w2_a, t.hada_w2_b, t.get("hada_t2"))
        return first * second * (alpha_of(self) / self.rank)


@dataclass(frozen=True)
class DoHa(WeightDecomposed):
    """Weight-decomposed LoHa, as LyCORIS has it. For its arguments see `LoHa` and `WeightDecomposed`.

    Example:
        >>> patch = adapters.inject(model, adapters.DoHa(rank=4))
        >>> patch.merge()
        >>> patch.save_pretrained("doha.safetensors", format="lycoris")
    """

    key = "doha"
    paper = LoHa.paper
    formula = "m V / ‖V‖ for each row, with V = W + s (A₁ B₁) ∘ (A₂ B₂)"
    adds = LoHa

    rank: int = 8
    alpha: float | None = None
    tucker: bool = False
    on_inputs: bool = False
