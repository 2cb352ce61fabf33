"""How LoRA starts: values of A and B that change nothing, or a part of the weight that is moved into them.

What is moved is not taken out of the weight, which stays as it is: the branch keeps its start, `start_B start_A`, and
subtracts it. So switching and ejecting stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

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
"""Gives A and B, as these matrices, for a weight, what was seen of its layer, a rank and a scale."""


@dataclass(frozen=True)
class Start:
    """One way to start.

    Attributes:
        fill: Sets A and B.
        moves: Whether their product is a part of the weight, so that it has to be subtracted.
        divides: Whether it undoes the scale, which cannot be 0 then.
        needs: What A and B are found from, if not from the weight alone: `"inputs"` of the layer, `"gradients"` of its
            weight, or its `"originals"`, weights from before they were quantised.
        fit: Finds A and B from these.
    """

    fill: Fill
    moves: bool = False
    divides: bool = False
    needs: str = ""
    fit: Fit | None = None

    def apply(self, branch: Branch, site: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
        """Set the factors of a new branch."""
        if down.is_meta or (site.uninitialized and not self.moves):
            return
        with torch.no_grad():
            a, b = as_matrices(down, up, site.matrix)
            self.fill(site, a, b, scaling)
            if self.moves:
                branch.register_buffer("start_A", a.clone())
                branch.register_buffer("start_B", b.clone())

    def restart(self, branch: Branch, down: Tensor, up: Tensor) -> None:
        """Give the factors of a branch other values to start with."""
        t = branch.values()
        a, b = as_matrices(t.lora_A, t.lora_B, branch.matrix)
        a.copy_(down)
        b.copy_(up)
        if self.moves:  # As the factors hold it: just what is added is subtracted.
            t.start_A.copy_(a)
            t.start_B.copy_(b)


def _zero_product(fill: Callable[[Tensor, int], Any]) -> Fill:
    """A as given and B zero; for embeddings, as in PEFT, A zero and B normal."""

    def fill_both(site: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
        if isinstance(site.layer, nn.Embedding):
            down.zero_()
            up.normal_()
        else:
            up.zero_()
            fill(down, down.shape[-2])

    return fill_both


def _kaiming(down: Tensor, rank: int) -> None:
    bound = down.shape[-1] ** -0.5
    down.uniform_(-bound, bound)


def _orthogonal(site: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
    """Both random, in orthogonal subspaces of the rank (https://datta0.github.io/posts/rethink-lora-init)."""
    rank = down.shape[-2]
    if rank % 2:
        raise TargetError(f"init='orthogonal' needs an even rank, not {rank}.")
    like: dict[str, Any] = {"device": down.device, "dtype": torch.promote_types(down.dtype, torch.float32)}
    stack = down.shape[:-2]
    q = torch.linalg.qr(torch.randn(*stack, rank, rank, **like)).Q
    down.copy_(q[..., 0::2, :].mT @ torch.randn(*stack, rank // 2, down.shape[-1], **like) / 10)
    up.copy_(torch.randn(*stack, rank // 2, up.shape[-2], **like).mT @ q[..., 1::2, :] / 10)


def _pissa(site: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
    """The principal part of the weight (arXiv:2404.02948)."""
    u, singular, vt = torch.linalg.svd(site.weight, full_matrices=False)
    rank = down.shape[-2]
    root = (singular[..., :rank] / abs(scaling)).sqrt()
    _set(site, down, root.unsqueeze(-1) * vt[..., :rank, :])
    _set(site, up, u[..., :rank] * root.unsqueeze(-2))


def _olora(site: WeightSpec, down: Tensor, up: Tensor, scaling: float) -> None:
    """The first columns and rows of a QR decomposition (arXiv:2406.01775)."""
    q, r = torch.linalg.qr(site.weight)
    _set(site, down, r[..., : down.shape[-2], :])
    _set(site, up, q[..., : down.shape[-2]])


def _set(site: WeightSpec, factor: Tensor, value: Tensor) -> None:
    if factor.shape != value.shape:
        *_, outputs, inputs = site.shape
        raise TargetError(
            f"{site.path} is {outputs} × {inputs}, too small for a rank of {factor.shape[-2]}: choose a smaller one."
        )
    factor.copy_(value)


_usual = _zero_product(_kaiming)

STARTS: Mapping[str, Start] = {
    "kaiming": Start(_usual),
    "gaussian": Start(_zero_product(lambda down, rank: down.normal_(std=1 / rank))),
    "orthogonal": Start(_orthogonal),
    "pissa": Start(_pissa, moves=True, divides=True),
    "olora": Start(_olora, moves=True),
    "eva": Start(_usual, needs="inputs", fit=eva),
    "corda": Start(_usual, moves=True, divides=True, needs="inputs", fit=partial(corda, principal=True)),
    "corda_kpm": Start(_usual, moves=True, divides=True, needs="inputs", fit=partial(corda, principal=False)),
    "lora_ga": Start(_usual, moves=True, needs="gradients", fit=lora_ga),
    "loftq": Start(_usual, divides=True, needs="originals", fit=loftq),
}
"""The ways by name."""
