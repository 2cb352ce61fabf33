"""HiRA: the weight is multiplied, entry by entry, by one plus a product of low rank."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adapters.methods.core.checks import need_rank
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class HiRA(Method):
    """Hadamard high-rank adaptation: the update has a high rank, though B A has a low one.

    Args:
        rank: Rows of A and columns of B.

    Raises:
        AdapterError: The rank is not an integer of 1 or more.

    Example:
        >>> patch = adapters.inject(model, adapters.HiRA(rank=4))
        >>> patch.merge()
        >>> patch.save_pretrained("hira")
    """

    key = "hira"
    paper = "https://openreview.net/forum?id=TwJrTz9cRS"
    formula = "W + W ∘ (B A)"
    kinds = frozenset({"linear", "convolution", "embedding", "stack"})
    plus_lr = frozenset({"hira_B"})

    rank: int = 32

    def __post_init__(self) -> None:
        need_rank(self)

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        *stack, outputs, inputs = spec.shape
        if spec.matrix.kind == "embedding":
            return {"hira_A": spec.zeros(self.rank, inputs), "hira_B": spec.normal(outputs, self.rank)}
        a, b = spec.uniform(*stack, self.rank, inputs, bound=inputs**-0.5), spec.zeros(*stack, outputs, self.rank)
        if spec.matrix.kind == "convolution":
            kernel: tuple[int, ...] = spec.layer.kernel_size  # type: ignore[assignment]
            return {"hira_A": a.view(self.rank, -1, *kernel), "hira_B": b.view(*b.shape, *(1 for _ in kernel))}
        return {"hira_A": a, "hira_B": b}

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        a, b = t.hira_A, t.hira_B
        if t.matrix.kind == "convolution":
            a, b = a.flatten(1), b.flatten(1)
        return weight + weight * (b @ a)

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        tensors = super().file_tensors(branch)
        if branch.matrix.kind == "embedding":
            return {name.replace("hira_", "hira_embedding_"): tensor for name, tensor in tensors.items()}
        return tensors
