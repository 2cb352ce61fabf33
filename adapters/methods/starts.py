"""How LoRA starts: values of A and B that change nothing, or a part of the weight that is moved into them.

What is moved is not taken out of the weight, which stays as it is: the branch keeps its start, `start_B start_A`, and
subtracts it. So switching and ejecting stay exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.branch import Branch
from adapters.errors import TargetError
from adapters.layers import Matrix
from adapters.method import Site

if TYPE_CHECKING:
    from adapters.methods.lora import LoRA

Fill = Callable[[Site, Tensor, Tensor, float], None]
"""Sets A and B, as the matrices `(rank, inputs)` and `(outputs, rank)`, for a weight and a scale."""


@dataclass(frozen=True)
class Start:
    """One way to start.

    Attributes:
        fill: Sets A and B.
        moves: Whether their product is not zero, so that it has to be subtracted.
    """

    fill: Fill
    moves: bool = False

    def apply(self, branch: Branch, site: Site, down: Tensor, up: Tensor, scaling: float) -> None:
        """Set the factors of a new branch."""
        if down.is_meta:
            return
        with torch.no_grad():
            a, b = as_matrices(down, up, site.matrix)
            self.fill(site, a, b, scaling)
            if self.moves:
                branch.register_buffer("start_A", a.clone())
                branch.register_buffer("start_B", b.clone())

    def saved(self, method: LoRA, branch: Branch) -> tuple[LoRA, dict[str, Tensor]]:
        """The method and the tensors that a file of plain LoRA has: the start beside the present values."""
        tensors = method.file_tensors(branch)
        if not self.moves:
            return method, tensors
        (a, down), (b, up) = sorted(tensors.items())
        start_a, start_b = branch.start_A.view_as(down), branch.start_B.view_as(up)
        rank = 2 * method.rank
        alpha = method.scaling * (rank**0.5 if method.rslora else rank)
        plain = replace(method, rank=rank, alpha=alpha, init="kaiming")
        stack = down.ndim == 3 and len(branch.matrix.shape) == 3
        return plain, {a: torch.cat([down, start_a], int(stack)), b: torch.cat([up, -start_b], 1 + int(stack))}


def as_matrices(down: Tensor, up: Tensor, matrix: Matrix) -> tuple[Tensor, Tensor]:
    """A and B as the matrices `(rank, inputs)` and `(outputs, rank)`, with the experts in front, sharing memory."""
    if matrix.kind == "embedding":
        return down.T, up
    return (down.flatten(1), up.flatten(1)) if matrix.kind == "convolution" else (down, up)


def _zero_product(fill: Callable[[Tensor, int], Any]) -> Fill:
    """A as given and B zero; for embeddings, as in PEFT, A zero and B normal."""

    def fill_both(site: Site, down: Tensor, up: Tensor, scaling: float) -> None:
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


def _orthogonal(site: Site, down: Tensor, up: Tensor, scaling: float) -> None:
    """Both random, in orthogonal subspaces of the rank (https://datta0.github.io/posts/rethink-lora-init)."""
    rank = down.shape[-2]
    if rank % 2:
        raise TargetError(f"init='orthogonal' needs an even rank, not {rank}.")
    like: dict[str, Any] = {"device": down.device, "dtype": torch.promote_types(down.dtype, torch.float32)}
    q = torch.linalg.qr(torch.randn(rank, rank, **like)).Q
    shape = (*down.shape[:-2], rank // 2)
    down.copy_(q[0::2].T @ torch.randn(*shape, down.shape[-1], **like) / 10)
    up.copy_(torch.randn(*shape, up.shape[-2], **like).mT @ q[1::2] / 10)


def _pissa(site: Site, down: Tensor, up: Tensor, scaling: float) -> None:
    """The principal part of the weight (arXiv:2404.02948)."""
    u, singular, vt = torch.linalg.svd(site.weight, full_matrices=False)
    rank = down.shape[-2]
    root = (singular[..., :rank] / abs(scaling)).sqrt()
    _set(down, root.unsqueeze(-1) * vt[..., :rank, :])
    _set(up, u[..., :rank] * root.unsqueeze(-2))


def _olora(site: Site, down: Tensor, up: Tensor, scaling: float) -> None:
    """The first columns and rows of a QR decomposition (arXiv:2406.01775)."""
    q, r = torch.linalg.qr(site.weight)
    _set(down, r[..., : down.shape[-2], :])
    _set(up, q[..., : down.shape[-2]])


def _set(factor: Tensor, value: Tensor) -> None:
    if factor.shape != value.shape:
        raise TargetError(f"A rank of {factor.shape[-2]} is more than this weight has: it is {tuple(value.shape)}.")
    factor.copy_(value)


STARTS: Mapping[str, Start] = {
    "kaiming": Start(_zero_product(_kaiming)),
    "gaussian": Start(_zero_product(lambda down, rank: down.normal_(std=1 / rank))),
    "orthogonal": Start(_orthogonal),
    "pissa": Start(_pissa, moves=True),
    "olora": Start(_olora, moves=True),
}
"""The ways by name."""
