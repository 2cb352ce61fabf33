"""Weight decomposition: the rows of an adapted weight are directions only, and their lengths are trained apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from adapters.errors import AdapterError
from adapters.methods.core.formulas import Additive
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors
from adapters.methods.core.tucker import channels


class WeightDecomposed(Method):
    """`m V / ‖V‖` for each row, where V is the weight that an inner method makes (DoRA, arXiv:2402.09353).

    The lengths m start as those of V. A subclass has the hyperparameters of the inner method, and `on_inputs`.

    Attributes:
        adds: The inner method.
        lengths: The name of the tensor of lengths.
        on_inputs: Train the lengths of the columns of each input instead, as LyCORIS does for `wd_on_out=False`.
    """

    adds: ClassVar[type[Additive]]
    lengths: ClassVar[str] = "dora_scale"
    on_inputs: bool

    def __post_init__(self) -> None:
        for name in self._inner_names:  # The inner method has completed some of them.
            object.__setattr__(self, name, getattr(self.inner, name))

    @cached_property
    def inner(self) -> Additive:
        """The method that makes V, with the hyperparameters of this one."""
        try:
            return self.adds(**{name: getattr(self, name) for name in self._inner_names})
        except AdapterError as problem:
            raise AdapterError(str(problem).replace(self.adds.__name__, type(self).__name__, 1)) from None

    @property
    def _inner_names(self) -> list[str]:
        return [field.name for field in fields(self.adds)]

    def check_spec(self, spec: WeightSpec) -> None:
        self.inner.check_spec(spec)

    # Its tensors

    def build(self, spec: WeightSpec, shared: dict[str, Tensor]) -> Branch:
        branch = self.inner.build(spec, shared)
        branch.matrix = spec.matrix
        branch.register_parameter(self.lengths, nn.Parameter(spec.empty(*self.shape_of_lengths(spec))))
        if spec.device.type != "meta" and not spec.uninitialized:
            self.measure(branch, spec.weight)
        return branch

    def shape_of_lengths(self, spec: WeightSpec) -> tuple[int, ...]:
        """The shape of the lengths: of a weight, without its other dimensions."""
        shape = (1, channels(spec)) if self.on_inputs else (spec.shape[0], 1)
        return (*shape, *(1 for _ in spec.kernel))

    def measure(self, branch: Branch, weight: Tensor) -> None:
        """Set the lengths to those of V, for a branch whose other tensors have new values."""
        with torch.no_grad():
            lengths = branch.get_parameter(self.lengths).view(*weight.shape[:-2], -1)
            start = self.inner.update(weight, branch.values(weight.dtype))
            lengths.copy_(norms(start, lengths.shape[-1] if self.on_inputs else 0))

    # Its formula

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        lengths = t[self.lengths].view(*weight.shape[:-2], -1)
        return decomposed(self.inner.update(weight, t), lengths, self.on_inputs)

    # Its files

    def hyperparameters(self) -> dict[str, Any]:
        return {**self.inner.hyperparameters(), "on_inputs": self.on_inputs}

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        return self.inner.file_tensors(branch)

    def check_tensors(self, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
        self.inner.check_tensors(spec, tensors)

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        inner, tensors = self.inner.saved(branch)
        tensors[self.lengths] = self.file_tensors(branch)[self.lengths]
        if inner is self.inner:
            return self, tensors
        return replace(self, **{name: getattr(inner, name) for name in self._inner_names}), tensors


def norms(weight: Tensor, inputs: int = 0) -> Tensor:
    """The length of each row of a matrix, `(outputs,)`; or if inputs are counted, that of the columns of each of them.

    Args:
        weight: The matrix, with the experts in front for a stack. An input of a convolution has a column for each
            position of the kernel.
        inputs: The number of inputs, 0 for the rows.
    """
    if not inputs:
        return torch.linalg.vector_norm(weight, dim=-1)
    return torch.linalg.vector_norm(weight.unflatten(-1, (inputs, -1)), dim=(-3, -1))


def decomposed(direction: Tensor, magnitude: Tensor, on_inputs: bool = False) -> Tensor:
    """A matrix with the direction of each row, or the columns of each input, at another length.

    The present lengths are constants to the gradient, as DoRA proposes in 4.3. Zeros, which have no direction, stay as
    they are.

    Args:
        direction: The matrix, `(outputs, inputs)`, with the experts in front for a stack.
        magnitude: The lengths, `(outputs,)` or `(inputs,)`, with the experts in front for a stack.
        on_inputs: Whether they are those of the inputs.
    """
    inputs = magnitude.shape[-1] if on_inputs else 0
    lengths = norms(direction, inputs).detach()
    zero = lengths == 0
    factors = torch.where(zero, 1.0, magnitude / torch.where(zero, 1.0, lengths))
    if not on_inputs:
        return direction * factors.unsqueeze(-1)
    return direction * factors.repeat_interleave(direction.shape[-1] // inputs, dim=-1).unsqueeze(-2)
