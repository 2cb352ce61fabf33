"""Weight decomposition: the rows of an adapted weight only say directions, and their lengths are trained apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from adapters.branch import Tensors
from adapters.forms import Additive, decomposed, norms
from adapters.layers import Matrix
from adapters.method import Method, Site
from adapters.methods.tucker import channels


@dataclass(frozen=True)
class Decomposed(Additive):
    """`m V / ‖V‖` for each row, where V is what another method, which is extended too, makes of the weight.

    The lengths `dora_scale` start as those of the weight.

    Args:
        on_inputs: Train the lengths of the columns of each input instead, as LyCORIS does for `wd_on_out=False`.
    """

    additive: ClassVar[bool] = False

    on_inputs: bool = False

    def tensors(self, site: Site) -> dict[str, Tensor]:
        shape = (1, channels(site)) if self.on_inputs else (site.shape[0], 1)
        lengths = site.empty(*shape, *(1 for _ in site.kernel))
        if not site.blank:
            lengths.copy_(norms(site.weight, shape[1] if self.on_inputs else 0).view_as(lengths))
        return {**super().tensors(site), "dora_scale": lengths}

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return decomposed(super().update(weight, t), t.dora_scale.flatten(), self.on_inputs)

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        return Method.change(self, weight, t, scale)

    def beside(self, layer: nn.Module, matrix: Matrix) -> bool:
        return False
