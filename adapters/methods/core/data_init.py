"""Initialisation of LoRA from data: A and B as matrices, from inputs, gradients or errors of a layer.

`adapters.initialize` collects the data and calls these functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import TargetError


@dataclass
class Inputs:
    """Running statistics of the inputs of a layer.

    Attributes:
        mean: Their mean, `(inputs,)`.
        scatter: The sum of the outer products of their deviations from the mean, `(inputs, inputs)`.
        count: The number of inputs.
    """

    mean: Tensor
    scatter: Tensor
    count: int = 0

    @classmethod
    def like(cls, weight: Tensor) -> Inputs:
        """Statistics of no inputs yet, for a weight of `(outputs, inputs)`."""
        size = weight.shape[-1]
        return cls(weight.new_zeros(size), weight.new_zeros(size, size))

    def add(self, rows: Tensor) -> None:
        """Add inputs, of shape `(rows, inputs)`."""
        rows = rows.to(self.mean)
        if not len(rows):
            return
        mean, before = rows.mean(0), self.count
        self.count += len(rows)
        step = mean - self.mean
        self.scatter.addmm_((rows - mean).T, rows - mean)
        self.scatter.addr_(step, step, alpha=before * len(rows) / self.count)
        self.mean += step * len(rows) / self.count

    @property
    def moments(self) -> Tensor:
        """Second moments, `(inputs, inputs)`."""
        return self.scatter / self.count + self.mean.outer(self.mean)

    def is_finite(self) -> bool:
        """Whether every number is finite."""
        return bool(self.scatter.isfinite().all())


def eva(weight: Tensor, inputs: Inputs, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A of the principal directions of the inputs, B of zeros (arXiv:2410.07170)."""
    if inputs.count <= rank:
        raise TargetError(f"{inputs.count} inputs are too few for a rank of {rank}: pass more batches")
    directions = torch.linalg.eigh(inputs.scatter).eigenvectors.flip(-1)
    return directions.T[:rank], weight.new_zeros(weight.shape[0], rank)


def corda(weight: Tensor, inputs: Inputs, rank: int, scaling: float, principal: bool) -> tuple[Tensor, Tensor]:
    """A part of the weight, chosen by its effect on the inputs (arXiv:2406.05223).

    `W = U S (Vᵀ C⁻¹)`, with `U S Vᵀ` the decomposition of `W C` and `C` the second moments of the inputs: the first
    components, which matter the most to the inputs (instruction-previewed), or the last ones, which matter the least
    (knowledge-preserved).
    """
    moments = inputs.moments
    if not moments.any():
        raise TargetError("all of its inputs are zero: pass other batches")
    moments = moments / moments.diagonal().mean()  # The unit of the inputs does not matter.
    moments.diagonal().add_(0.01)  # Also when there are fewer inputs than dimensions, there is an inverse.
    u, singular, vt = torch.linalg.svd(weight @ moments, full_matrices=False)
    part = slice(rank) if principal else slice(max(len(singular) - rank, 0), None)
    root = (singular[part] / abs(scaling)).sqrt()
    return root.unsqueeze(-1) * torch.linalg.solve(moments, vt[part].T).T, u[:, part] * root


def lora_ga(weight: Tensor, gradient: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B of singular vectors of the gradient, so that the first step follows it (arXiv:2407.05000)."""
    if 2 * rank > min(gradient.shape[-2:]):
        raise TargetError(f"the rank can be {min(gradient.shape[-2:]) // 2} at most, half of that of the weight")
    u, _, vt = torch.linalg.svd(gradient, full_matrices=False)
    stable = gradient.shape[-2] ** 0.25 / _GAMMA**0.5
    return stable * vt[..., :rank, :], stable * u[..., rank : 2 * rank]


_GAMMA = 16  # As in the experiments of the paper.


def loftq(weight: Tensor, error: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """The low-rank product nearest to the quantization error of a weight (arXiv:2310.08659, one step)."""
    u, singular, vt = torch.linalg.svd(error, full_matrices=False)
    root = (singular[..., :rank] / abs(scaling)).sqrt()
    sign = 1 if scaling > 0 else -1
    return root.unsqueeze(-1) * vt[..., :rank, :], sign * u[..., :rank] * root.unsqueeze(-2)
