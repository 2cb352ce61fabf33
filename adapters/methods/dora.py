"""DoRA: LoRA turns the rows of the weight, and their lengths are trained apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adapters.layers.matrix import Matrix
from adapters.methods.core.checks import need, refuse_dropout
from adapters.methods.core.formulas import decomposed, norms
from adapters.methods.core.method import Branch, Method, Tensors
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tucker import channels
from adapters.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(LoRA):
    """Weight-decomposed low-rank adaptation.

    Args:
        rank: As in `LoRA`, like `alpha`, `rslora` and `init`.
        dropout: For files that have it: it can be kept, but not trained with.
        bias: There is none.
        on_inputs: Train the lengths of the columns of each input instead, as LyCORIS does for `wd_on_out=False`, and
            OneTrainer.

    Raises:
        AdapterError: A number is out of its range.
    """

    key = "dora"
    paper = "arXiv:2402.09353"
    formula = "m V / ‖V‖ for each row, with V = W + s B A"
    additive = False

    on_inputs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need(not self.bias, self, "bias=False", self.bias)

    def check_training(self, layer: nn.Module, parameter: str) -> None:
        refuse_dropout(self, layer)

    def build(self, site: WeightSpec, shared: dict[str, Tensor]) -> Branch:
        branch = super().build(site, shared)
        branch.matrix = site.matrix
        *stack, outputs, _ = site.shape
        count = channels(site) if self.on_inputs else outputs
        branch.register_parameter("lora_magnitude_vector", nn.Parameter(site.empty(*stack, count)))
        if not (branch.lora_magnitude_vector.is_meta or site.uninitialized):
            self.settle(branch, site.weight)
        return branch

    def starts(self, sites: Sequence[WeightSpec], like: Mapping[str, Tensor]) -> None:
        """Each weight has lengths of its own."""

    def settle(self, branch: Branch, weight: Tensor) -> None:
        """The lengths are those that there are at the start."""
        with torch.no_grad():
            start = weight + self.delta(branch.values(weight.dtype))
            lengths = branch.lora_magnitude_vector
            lengths.copy_(norms(start, lengths.shape[-1] if self.on_inputs else 0))

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return decomposed(weight + self.delta(t), t.lora_magnitude_vector, self.on_inputs)

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        return Method.change(self, weight, t, scale)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return False

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        tensors = super().file_tensors(branch)
        if branch.matrix.kind == "convolution":  # As outputs have them, or inputs.
            ones = (1,) * (tensors["lora_B"].ndim - 2)
            tensors["lora_magnitude_vector"] = tensors["lora_magnitude_vector"].view(1, -1, *ones)
        return tensors
