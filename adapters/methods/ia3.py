"""(IA)³: each feature of the output, or of the input, is multiplied by a trained number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adapters.layers.matrix import Matrix
from adapters.methods.core.arithmetic import Scale
from adapters.methods.core.formulas import InputTransform, OutputTransform
from adapters.methods.core.method import Branch, Tensors
from adapters.methods.core.spec import WeightSpec


@dataclass(frozen=True)
class IA3(OutputTransform, InputTransform):
    """Infused adapter by inhibiting and amplifying inner activations.

    The paper rescales the output of the keys and values of an attention, and the input of the second layer of a
    feed-forward block: `inject(model, {"k_proj": IA3(), "v_proj": IA3(), "down_proj": IA3(feedforward=True)})`.

    Args:
        feedforward: Multiply the input (of a convolution, its channels; of an embedding, its entries) rather than the
            output.
        bias: Multiply the bias as well as the rest of the output, as in the paper. LyCORIS leaves it as it is.
    """

    key = "ia3"
    paper = "arXiv:2205.05638"
    formula = "diag(l) W and diag(l) b, or W diag(l) for an input"

    feedforward: bool = False
    bias: bool = True

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        outputs, inputs = site.shape
        if site.matrix.kind == "convolution":
            channels: Any = site.layer.in_channels if self.feedforward else outputs
            return {"ia3_l": site.ones(1, channels, *(1 for _ in site.layer.kernel_size))}  # type: ignore[union-attr]
        return {"ia3_l": site.ones(1, inputs) if self.feedforward else site.ones(outputs, 1)}

    def map(self, x: Tensor, t: Tensors, transposed: bool = False) -> Tensor:
        return x * (_of_each_entry(t.ia3_l, t.matrix) if self.feedforward else t.ia3_l.flatten())

    # Which of the two forms it has

    @property
    def _form(self) -> type[OutputTransform] | type[InputTransform]:
        return InputTransform if self.feedforward else OutputTransform

    def names(self, site: WeightSpec) -> tuple[str, ...]:
        return self._form.names(self, site) if self.bias else (site.parameter,)

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return self._form.update(self, weight, t)

    def update_bias(self, bias: Tensor | None, weight: Tensor, t: Tensors) -> Tensor | None:
        return self._form.update_bias(self, bias, weight, t)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return (self.bias or self.feedforward) and self._form.bypass(self, layer, matrix)

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, *args: Any, **kwargs: Any) -> Any:
        return self._form.run(self, branch, layer, scale, *args, **kwargs)


def _of_each_entry(channels: Tensor, matrix: Matrix) -> Tensor:
    """What multiplies each input of a matrix: that of its channel, in each row that of the channel in the row's group.

    Returns:
        Of shape `(inputs,)`, or `(outputs, inputs)` for a convolution in groups.
    """
    outputs, inputs = matrix.shape
    groups = channels.reshape(matrix.groups, -1)
    entries = groups.repeat_interleave(inputs // groups.shape[1], 1)
    return entries[0] if matrix.groups == 1 else entries.repeat_interleave(outputs // matrix.groups, 0)
