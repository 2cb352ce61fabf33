"""AdaLoRA: a product of three factors, of which the diagonal middle one weighs each rank."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from adapters.methods.core.checks import alpha_of, is_integer, need, need_alpha, need_dropout, need_rank, refuse_dropout
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class AdaLoRA(LowRank):
    """Adaptive low-rank adaptation: `adapters.RankAllocator` moves the rank to where it matters during training.

    Args:
        rank: Initial rows of A and columns of B.
        alpha: The strength, `rank` when it is None. The update is scaled by `alpha / rank`, whatever rank is left.
        dropout: For files that have it: it can be kept, but not trained with.
        kept: Rows of A and columns of B that are left, `rank` when it is None. Files leave out those without effect.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.AdaLoRA(rank=6), name="style")
        >>> allocator = adapters.RankAllocator(patch, total_steps=100, target_rank=4)
        >>> print(patch)
    """

    key = "adalora"
    paper = "arXiv:2303.10512"
    formula = "W + s B diag(E) A, with s = alpha / rank"
    kinds = frozenset({"linear", "convolution", "embedding", "stack"})
    plus_lr = frozenset({"lora_E"})

    rank: int = 12
    alpha: float | None = None
    dropout: float = 0.0
    kept: int | None = None

    def __post_init__(self) -> None:
        need_rank(self)
        need_alpha(self)
        need_dropout(self)
        fits = self.kept is None or (is_integer(self.kept, 0) and self.kept <= self.rank)
        need(fits, self, f"a kept of 0 up to the rank, {self.rank}", self.kept)

    @property
    def scaling(self) -> float:
        """`s` of the formula."""
        return alpha_of(self) / (self.rank + 1e-5)  # As the authors and PEFT have it, against a rank of 0.

    def check_training(self, layer: nn.Module, parameter: str) -> None:
        refuse_dropout(self, layer)

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        *stack, outputs, inputs = spec.shape
        rank = self.rank if self.kept is None else self.kept
        return {
            "lora_A": spec.normal(*stack, rank, inputs, std=0.02),
            "lora_B": spec.normal(*stack, outputs, rank, std=0.02),
            "lora_E": spec.zeros(*stack, rank, 1),
        }

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        return t.lora_B * self.scaling, t.lora_A * t.lora_E

    def hyperparameters(self) -> dict[str, Any]:
        return {name: value for name, value in super().hyperparameters().items() if name != "kept"}

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        """AdaLoRA without the rows that have no effect, unless there are no others, as before training."""
        tensors = self.file_tensors(branch)
        has_effect = tensors["lora_E"].squeeze(-1) != 0
        if has_effect.ndim > 1 or has_effect.all() or not has_effect.any():
            return self, tensors
        a, b, e = (tensors[name] for name in ("lora_A", "lora_B", "lora_E"))
        pruned = {"lora_A": a[has_effect], "lora_B": b[:, has_effect], "lora_E": e[has_effect]}
        return replace(self, kept=int(torch.count_nonzero(has_effect))), pruned
