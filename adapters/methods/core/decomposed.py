"""Weight decomposition: the rows of an adapted weight only say directions, and their lengths are trained apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from adapters.layers.matrix import Matrix
from adapters.methods.core.formulas import Additive, decomposed, norms
from adapters.methods.core.method import Method, Tensors
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tucker import channels


@dataclass(frozen=True)
class Decomposed(Additive):
    """`m V / ‖V‖` for each row, where V is what another method, which is extended too, makes of the weight.

    The lengths `dora_scale` start as those of the weight.

    Args:
        on_inputs: Train the lengths of the columns of each input instead, as LyCORIS does for `wd_on_out=False`.
    """

    additive: ClassVar[bool] = False

    on_inputs: bool = False

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        shape = (1, channels(site)) if self.on_inputs else (site.shape[0], 1)
        lengths = site.empty(*shape, *(1 for _ in site.kernel))
        if not site.uninitialized:
            lengths.copy_(norms(site.weight, shape[1] if self.on_inputs else 0).view_as(lengths))
        return {**super().tensors(site), "dora_scale": lengths}

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return decomposed(super().update(weight, t), t.dora_scale.flatten(), self.on_inputs)

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        return Method.change(self, weight, t, scale)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return False
