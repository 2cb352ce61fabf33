"""DoRA: LoRA turns the rows of the weight, and their lengths are trained apart."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from adapters.methods.core.checks import need, refuse_dropout
from adapters.methods.core.decomposed import WeightDecomposed
from adapters.methods.core.init import InitName
from adapters.methods.core.method import Branch
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tucker import channels
from adapters.methods.lora import LoRA


@dataclass(frozen=True)
class DoRA(WeightDecomposed):
    """Weight-decomposed low-rank adaptation.

    Args:
        rank: As in `LoRA`, like `alpha`, `rslora` and `init`.
        dropout: For files that have it: it can be kept, but not trained with.
        bias: There is none.
        on_inputs: Train the lengths of the columns of each input instead, as LyCORIS does for `wd_on_out=False`, and
            OneTrainer.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.DoRA(rank=4, alpha=8))
        >>> patch.merge()
        >>> patch.save_pretrained("dora")
    """

    key = "dora"
    paper = "arXiv:2402.09353"
    formula = "m V / ‖V‖ for each row, with V = W + s B A"
    kinds = LoRA.kinds
    plus_lr = LoRA.plus_lr
    adds = LoRA
    lengths = "lora_magnitude_vector"

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    bias: bool = False
    init: InitName = "kaiming"
    on_inputs: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        need(not self.bias, self, "bias=False", self.bias)

    def check_training(self, layer: nn.Module, parameter: str) -> None:
        refuse_dropout(self, layer)

    def shape_of_lengths(self, spec: WeightSpec) -> tuple[int, ...]:
        *stack, outputs, _ = spec.shape
        return (*stack, channels(spec) if self.on_inputs else outputs)

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        tensors = super().file_tensors(branch)
        if branch.matrix.kind == "convolution":  # The shape of the channels of its outputs, or its inputs.
            ones = (1,) * (tensors["lora_B"].ndim - 2)
            tensors[self.lengths] = tensors[self.lengths].view(1, -1, *ones)
        return tensors
