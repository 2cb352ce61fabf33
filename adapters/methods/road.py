"""RoAd: pairs of outputs are rotated and rescaled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import TargetError
from adapters.methods.core.checks import is_integer, need, need_choice
from adapters.methods.core.formulas import OutputTransform
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors

_SIZES = {"road_1": 0.5, "road_2": 1, "road_4": 2}
"""The numbers of angles, and of scales, for each output."""


@dataclass(frozen=True)
class RoAd(OutputTransform):
    """2D rotary adaptation.

    Outputs come in groups; in each, the first half is paired with the second, element by element. A pair `(p, q)`
    becomes `(a cos θ p - b sin φ q, c cos ψ q + d sin ω p)`. The variant says which of these scales and angles are
    equal: all for `"road_1"`, a proper rotation; those of each new element, `a = b` and `c = d`, for `"road_2"`; none
    for `"road_4"`.

    Args:
        variant: `"road_1"`, `"road_2"` or `"road_4"`.
        group_size: The number of outputs in a group, which is even and divides the outputs of every layer, and of each
            group of a grouped convolution.

    Raises:
        AdapterError: There is no such variant, or the group size is not an even positive integer.

    Example:
        >>> patch = adapters.inject(model, adapters.RoAd("road_2", group_size=8))
        >>> print(patch.num_parameters())
        >>> patch.save_pretrained("road")
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

    def check_spec(self, spec: WeightSpec) -> None:
        groups = spec.matrix.groups  # Outputs of different inputs cannot be mixed in the weight of a convolution.
        if spec.shape[0] // groups % self.group_size:
            of = f" in each of {groups} groups" if groups > 1 else ""
            raise TargetError(
                f"{spec.path} has {spec.shape[0] // groups} outputs{of}, which group_size={self.group_size} does not"
                " divide: choose a divisor."
            )

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        size = int(spec.shape[0] * _SIZES[self.variant])
        return {"road_theta": spec.zeros(size), "road_alpha": spec.ones(size)}

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
