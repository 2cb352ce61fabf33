"""GLoRA as LyCORIS has it: a product of low rank is applied to the input, and another is added to the weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.methods.core.checks import alpha_of, need_alpha, need_rank
from adapters.methods.core.method import Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class LycorisGLoRA(Method):
    """LyCORIS' part of GLoRA: of the five tensors of the paper those that adapt the weight, A from the other side.

    On a convolution A acts on the channels.

    Args:
        rank: Rank of both products.
        alpha: The strength, `rank` when it is None. The update is scaled by `alpha / rank`.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.LycorisGLoRA(rank=4))
        >>> patch.merge()
        >>> patch.save_pretrained("glora.safetensors", format="lycoris")
    """

    key = "lycoris-glora"
    paper = "arXiv:2306.07967"
    formula = "W + s (W A₁ A₂ + B₁ B₂), with s = alpha / rank"
    plus_lr = frozenset({"a2", "b2"})

    rank: int = 4
    alpha: float | None = None

    def __post_init__(self) -> None:
        need_rank(self)
        need_alpha(self)

    @property
    def scaling(self) -> float:
        """`s` of the formula."""
        return alpha_of(self) / self.rank

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        outputs, inputs = spec.shape
        kernel: tuple[int, ...] = getattr(spec.layer, "kernel_size", ()) if spec.matrix.kind == "convolution" else ()
        ones, channels = tuple(1 for _ in kernel), inputs // torch.Size(kernel).numel()
        return {
            "a1": spec.uniform(channels, self.rank, *ones),
            "a2": spec.zeros(self.rank, channels, *ones),
            "b1": spec.uniform(outputs, self.rank, *ones),
            "b2": spec.zeros(self.rank, channels, *kernel),
        }

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        a1, a2, b1, b2 = (t[name].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        channels = weight.unflatten(1, (len(a1), -1))
        mapped = torch.einsum("ock,cr,rd->odk", channels, a1, a2).flatten(1)
        return weight + self.scaling * (mapped + b1 @ b2)
