"""(IA)³: each feature of the output, or of the input, is multiplied by a trained factor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adapters.layers.matrix import Matrix
from adapters.methods.core.arithmetic import Scale
from adapters.methods.core.formulas import InputTransform, OutputTransform
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class IA3(Method):
    """Infused adapter by inhibiting and amplifying inner activations.

    The paper rescales the output of the keys and values of an attention, and the input of the second layer of a
    feed-forward block: `inject(model, {"k_proj": IA3(), "v_proj": IA3(), "down_proj": IA3(feedforward=True)})`.

    Args:
        feedforward: Multiply the input (of a convolution, its channels; of an embedding, its entries) rather than the
            output.
        bias: Multiply the bias as well as the rest of the output, as in the paper. LyCORIS leaves it as it is.

    Example:
        >>> patch = adapters.inject(model, {"k_proj": adapters.IA3(), "v_proj": adapters.IA3()})
        >>> print(patch.num_parameters())
        >>> patch.save_pretrained("ia3")
    """

    key = "ia3"
    paper = "arXiv:2205.05638"
    kinds = OutputTransform.kinds
    formula = "diag(l) W and diag(l) b, or W diag(l) for an input"

    feedforward: bool = False
    bias: bool = True

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        outputs, inputs = spec.shape
        if spec.matrix.kind == "convolution":
            channels: Any = spec.layer.in_channels if self.feedforward else outputs
            return {"ia3_l": spec.ones(1, channels, *(1 for _ in spec.layer.kernel_size))}  # type: ignore[union-attr]
        return {"ia3_l": spec.ones(1, inputs) if self.feedforward else spec.ones(outputs, 1)}

    # The formula, in one of two forms

    @property
    def _form(self) -> Method:
        return _INPUTS if self.feedforward else _OUTPUTS

    def changes(self, spec: WeightSpec) -> tuple[str, ...]:
        return self._form.changes(spec) if self.bias else (spec.parameter,)

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return self._form.update(weight, t)

    def update_bias(self, bias: Tensor | None, weight: Tensor, t: Tensors) -> Tensor | None:
        return self._form.update_bias(bias, weight, t)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return (self.bias or self.feedforward) and self._form.bypass(layer, matrix)

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, *args: Any, **kwargs: Any) -> Any:
        return self._form.run(branch, layer, scale, *args, **kwargs)


class _Outputs(OutputTransform):
    """Outputs times a number each."""

    def map(self, y: Tensor, t: Tensors) -> Tensor:
        return y * t.ia3_l.flatten()


class _Inputs(InputTransform):
    """Inputs times a number each."""

    def map(self, x: Tensor, t: Tensors, transposed: bool) -> Tensor:
        return x * _of_each_entry(t.ia3_l, t.matrix)


_OUTPUTS, _INPUTS = _Outputs(), _Inputs()


def _of_each_entry(channels: Tensor, matrix: Matrix) -> Tensor:
    """The factor of each input of a matrix: the one of its channel, in the group of the row.

    Returns:
        Of shape `(inputs,)`, or `(outputs, inputs)` for a convolution in groups.
    """
    outputs, inputs = matrix.shape
    groups = channels.reshape(matrix.groups, -1)
    entries = groups.repeat_interleave(inputs // groups.shape[1], 1)
    return entries[0] if matrix.groups == 1 else entries.repeat_interleave(outputs // matrix.groups, 0)
