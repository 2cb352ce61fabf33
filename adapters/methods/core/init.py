"""Initialisation of LoRA: values of A and B that change nothing, or those of a part of the weight.

Such a part is not taken out of the weight, which stays as it is: the branch keeps the initial product, `start_B
start_A`, and subtracts it. So switching and ejecting stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adapters.errors import TargetError
from adapters.methods.core.data_init import corda, eva, loftq, lora_ga
from adapters.methods.core.factors import as_matrices
from adapters.methods.core.method import Branch
from adapters.methods.core.spec import WeightSpec

Fill = Callable[[WeightSpec, Tensor, Tensor, float], None]
"""Sets A and B, as the matrices `(rank, inputs)` and `(outputs, rank)`, for a weight and a scale."""
Fit = Callable[[Tensor, Any, int, float], tuple[Tensor, Tensor]]
"""Gives A and B, as these matrices, for a weight, the data seen at its layer, a rank and a scale."""


@dataclass(frozen=True)
class Init:
    """An initialisation of A and B.

    Attributes:
        fill: Sets A and B.
        subtracted: Whether their product is a part of the weight, so that it has to be subtracted.
        divides: Whether it undoes the scale, which cannot be 0 then.
        needs: The data that A and B are found from, if not from the weight alone: `"inputs"` of the layer,
            `"gradients"` of its weight, or its `"originals"`, weights from before they were quantized.
        fit: Finds A and B from these.
    """

    fill: Fill
    subtracted: bool = False
    divides: bool = False
    needs: str = ""
    fit: Fit | None = None

    def apply(self, branch: Branch, spec: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
        """Set the factors of a new branch."""
        if down.is_meta or (spec.uninitialized and not self.subtracted):
            return
        with torch.no_grad():
            a, b = as_matrices(down, up, spec.matrix)
            self.fill(spec, a, b, scaling)
            if self.subtracted:
                branch.register_buffer("start_A", a.clone())
                branch.register_buffer("start_B", b.clone())

    def apply_again(self, branch: Branch, down: Tensor, up: Tensor) -> None:
        """Set the factors of a branch to other initial values."""
        t = branch.values()
        a, b = as_matrices(t.lora_A, t.lora_B, branch.matrix)
        a.copy_(down)
        b.copy_(up)
        if self.subtracted:  # As the factors hold it: exactly what is added is subtracted.
            t.start_A.copy_(a)
            t.start_B.copy_(b)


def _zero_product(fill: Callable[[Tensor, int], Any]) -> Fill:
    """A from a function and B zero; for embeddings, as in PEFT, A zero and B normal."""

    def fill_both(spec: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
        if isinstance(spec.layer, nn.Embedding):
            down.zero_()
            up.normal_()
        else:
            up.zero_()
            fill(down, down.shape[-2])

    return fill_both


def _kaiming(down: Tensor, rank: int) -> None:
    bound = down.shape[-1] ** -0.5
    down.uniform_(-bound, bound)


def _orthogonal(spec: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
    """A and B random, in orthogonal subspaces of the rank (https://datta0.github.io/posts/rethink-lora-init)."""
    rank = down.shape[-2]
    if rank % 2:
        raise TargetError(f"init='orthogonal' needs an even rank, not {rank}.")
    like: dict[str, Any] = {"device": down.device, "dtype": torch.promote_types(down.dtype, torch.float32)}
    stack = down.shape[:-2]
    q = torch.linalg.qr(torch.randn(*stack, rank, rank, **like)).Q
    down.copy_(q[..., 0::2, :].mT @ torch.randn(*stack, rank // 2, down.shape[-1], **like) / 10)
    up.copy_(torch.randn(*stack, rank // 2, up.shape[-2], **like).mT @ q[..., 1::2, :] / 10)


def _pissa(spec: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
    """The principal part of the weight (arXiv:2404.02948)."""
    u, singular, vt = torch.linalg.svd(spec.weight, full_matrices=False)
    rank = down.shape[-2]
    root = (singular[..., :rank] / abs(scaling)).sqrt()
    _set(spec, down, root.unsqueeze(-1) * vt[..., :rank, :])
    _set(spec, up, u[..., :rank] * root.unsqueeze(-2))


def _olora(spec: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
    """The first columns and rows of a QR decomposition (arXiv:2406.01775)."""
    q, r = torch.linalg.qr(spec.weight)
    _set(spec, down, r[..., : down.shape[-2], :])
    _set(spec, up, q[..., : down.shape[-2]])


def _set(spec: WeightSpec, factor: Tensor, value: Tensor) -> None:
    if factor.shape != value.shape:
        *_, outputs, inputs = spec.shape
        raise TargetError(
            f"{spec.path} is {outputs} × {inputs}, too small for a rank of {factor.shape[-2]}: choose a smaller one."
        )
    factor.copy_(value)


InitName = Literal[
    "kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva", "corda", "corda_kpm", "lora_ga", "loftq"
]
"""The names that `LoRA.init` can have."""

_usual = _zero_product(_kaiming)

INITS: Mapping[InitName, Init] = {
    "kaiming": Init(_usual),
    "gaussian": Init(_zero_product(lambda down, rank: down.normal_(std=1 / rank))),
    "orthogonal": Init(_orthogonal),
    "pissa": Init(_pissa, subtracted=True, divides=True),
    "olora": Init(_olora, subtracted=True),
    "eva": Init(_usual, needs="inputs", fit=eva),
    "corda": Init(_usual, subtracted=True, divides=True, needs="inputs", fit=partial(corda, principal=True)),
    "corda_kpm": Init(_usual, subtracted=True, divides=True, needs="inputs", fit=partial(corda, principal=False)),
    "lora_ga": Init(_usual, subtracted=True, needs="gradients", fit=lora_ga),
    "loftq": Init(_usual, divides=True, needs="originals", fit=loftq),
}
"""The initialisations by name."""
