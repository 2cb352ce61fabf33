"""RoAd: pairs of outputs are rotated and rescaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import TargetError
from adapters.methods.core.checks import is_integer, need, need_choice
from adapters.methods.core.formulas import OutputTransform
from adapters.methods.core.method import Tensors
from adapters.methods.core.spec import WeightSpec

_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}
"""The numbers of angles, and of scales, for each output."""


@dataclass(frozen=True)
class RoAd(OutputTransform):
    """2D rotary adaptation.

    Outputs come in groups; in each, the first half is paired with the second, element by element. A pair `(p, q)`
    becomes `(a cos θ p - b sin φ q, c cos ψ q + d sin ω p)`. What differs of these scales and angles is a question of
    the variant: nothing for `"road_1"`, a proper rotation; one scale and angle for each new element, `a = b`, `c = d`,
    for `"road_2"`; all of them for `"road_4"`.

    Args:
        variant: `"road_1"`, `"road_2"` or `"road_4"`.
        group_size: Outputs in a group: an even number that divides the outputs of every layer, and for a convolution
            in groups, those of each of its groups.

    Raises:
        AdapterError: There is no such variant, or the group size is odd or no positive integer.
    """

    key = "road"
    paper = "arXiv:2409.00119"
    formula = "R W and R b, with R of scaled rotations in two dimensions"

    variant: str = "road_1"
    group_size: int = 64

    def __post_init__(self) -> None:
        need_choice(self, "variant", _SIZES)
        size = self.group_size
        need(is_integer(size, 1) and size % 2 == 0, self, "a group_size that is even and positive", size)

    def check_site(self, site: WeightSpec) -> None:
        groups = site.matrix.groups  # Outputs of different inputs cannot be mixed in the weight of a convolution.
        if site.shape[0] // groups % self.group_size:
            of = f" in each of {groups} groups" if groups > 1 else ""
            raise TargetError(
                f"{site.path} has {site.shape[0] // groups} outputs{of}, which RoAd cannot divide by {self.group_size}:"
                " give it a group_size that divides them."
            )

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        size = int(site.shape[0] * _SIZES[self.variant])
        return {"road_theta": site.zeros(size), "road_alpha": site.ones(size)}

    def map(self, y: Tensor, t: Tensors) -> Tensor:
        # Each of shape (groups, 2, half a group): the factors of an element itself, and of the other one of its pair.
        own, other = self._per_element(t.road_alpha, t.road_theta)
        pairs = y.unflatten(-1, own.shape)
        first, second = pairs.unbind(-2)
        return (pairs * own + torch.stack([-second, first], -2) * other).flatten(-3)

    def _per_element(self, alpha: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        half = self.group_size // 2
        if self.variant == "road_4":  # In each group, those of the elements themselves come first.
            (own, other), (angle, turned) = (x.view(-1, 2, 2, half).unbind(1) for x in (alpha, theta))
            return own * angle.cos(), other * turned.sin()
        alpha, theta = (x.view(-1, 1 if self.variant == "road_1" else 2, half) for x in (alpha, theta))
        own, other = alpha * theta.cos(), alpha * theta.sin()
        return own.expand(-1, 2, half), other.expand(-1, 2, half)
