"""Full: a trained change of the whole weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adapters.layers.matrix import Matrix
from adapters.methods.core.checks import need
from adapters.methods.core.formulas import Additive
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class Full(Additive):
    """Full fine-tuning, kept apart from the weight: the change has the weight's own shape.

    Args:
        bias: Train a change of the bias too, of each layer that has one.

    Raises:
        AdapterError: `bias` is not a boolean.

    Example:
        >>> patch = adapters.inject(model, adapters.Full(bias=True), targets="head")
        >>> patch.merge()
        >>> patch.save_pretrained("head.safetensors", format="lycoris")
    """

    key = "full"
    paper = "arXiv:2309.14859"
    formula = "W + D, where D starts at zero"

    bias: bool = False

    def __post_init__(self) -> None:
        need(isinstance(self.bias, bool), self, "a bias that is True or False", self.bias)

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        return Matrix.whole(layer, parameter)

    def selects(self, parameter: str) -> bool:
        return parameter == "weight" or (self.bias and parameter in ("bias", "in_proj_bias"))

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        return {"diff": spec.zeros(*spec.shape)}

    def delta(self, t: Tensors) -> Tensor:
        return t.diff
