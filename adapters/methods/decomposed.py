"""Weight decomposition: the rows of an adapted weight only say directions, and their lengths are trained apart."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from adapters.branch import Tensors
from adapters.forms import Additive, decomposed, row_norms
from adapters.layers import Matrix
from adapters.method import Method, Site


class Decomposed(Additive):
    """`m V / ‖V‖` for each row, where V is what another method, which is extended too, makes of the weight.

    The lengths `dora_scale` start as those of the weight.
    """

    additive: ClassVar[bool] = False

    def tensors(self, site: Site) -> dict[str, Tensor]:
        lengths = row_norms(site.weight).view(-1, 1, *(1 for _ in site.kernel))
        return {**super().tensors(site), "dora_scale": lengths.to(site.device, site.dtype)}

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return decomposed(super().update(weight, t), t.dora_scale.flatten())

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        return Method.change(self, weight, t, scale)

    def beside(self, layer: nn.Module, matrix: Matrix) -> bool:
        return False
