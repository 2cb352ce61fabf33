"""`Branch`, the part of one patch at one weight of a layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.layers import Matrix
from adapters.sharded import whole

if TYPE_CHECKING:
    from adapters.method import Method
    from adapters.patch import Patch


class Tensors(Mapping[str, Tensor]):
    """The tensors of a branch by name, as attributes and as items, all in one dtype.

    Attributes:
        matrix: What the weight is as a matrix.
    """

    def __init__(self, tensors: Mapping[str, Tensor], matrix: Matrix) -> None:
        self._tensors = tensors
        self.matrix = matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, `(outputs, inputs)`, with the experts in front for a stack."""
        return self.matrix.shape

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise AttributeError(f"There is no tensor {name!r}, only {', '.join(self._tensors)}.") from None

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Branch(fl.Chain):
    """The part of one patch at one weight of a layer: the tensors, and what the method makes of them.

    Attributes:
        method: The hyperparameters and the formula.
        matrix: What the weight is as a matrix; `Matrix.whole` where the method changes no weight.
        parameter: The name of the weight in its layer.
        names: The parameters of the layer that the branch changes, the weight first. None for a method that has no
            form as a change of weights.
        beside: Whether the method computes it beside the layer, if that is linear in its weight.
        common: The names of the tensors that all branches of the method share, in the patch.
        constants: The names of parameters that are never trained.
        patch: The patch it belongs to.
        tied: Whether its tensors are those of another branch, at another use of the same weight.
        divided: What computes the node it is in, if its tensors are divided with the layer's on several processes.
    """

    _tag = ""  # It is that of the method, in the label.

    method: Method
    matrix: Matrix
    parameter: str
    names: tuple[str, ...]
    beside: bool
    common: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()
    patch: Patch
    tied: bool = False
    divided: Callable[..., Any] | None = None

    def change(self, weights: Mapping[str, Tensor | None], scale: float) -> dict[str, Tensor | None]:
        """The weights of a layer that computes what the layer of these weights and this branch compute together.

        Args:
            weights: By name, in the precision to compute in, each of its own shape. They are not changed.
            scale: The strength, 1 for the method as its paper states it.
        """
        changed = dict(weights)
        weight = weights[self.parameter]
        if weight is None or not self.names:
            return changed
        tensors, matrix = self.values(weight.dtype), self.matrix.read(weight)
        changed[self.parameter] = self.matrix.write(self.method.change(matrix, tensors, scale), like=weight)
        for name in self.names[1:]:
            bias, updated = weights[name], self.method.update_bias(weights[name], matrix, tensors)
            if updated is not None:
                changed[name] = (torch.zeros_like(updated) if bias is None else bias).lerp(updated, scale)
        return changed

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; those of a layer of this chain that has just a weight by the name of the layer."""
        named = (*self.named_parameters(), *self.named_buffers())
        return {name.removesuffix(".weight"): tensor for name, tensor in named}

    def shared_tensors(self) -> dict[str, Tensor]:
        """The tensors that it has in common with the other branches of its method."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None and name in self.common}

    def values(self, dtype: torch.dtype | None = None) -> Tensors:
        """The tensors as a formula takes them, whole where several processes have them in parts.

        Args:
            dtype: What to convert floating-point ones to; by default they stay as they are, but for those that are
                shared with layers on other devices or in other dtypes.
        """
        tensors = {name: whole(tensor) for name, tensor in self.tensors().items()}
        if self.common and (own := self._first()) is not None:
            for name in self.common:
                shared = tensors[name]
                tensors[name] = shared.to(own.device, own.dtype if shared.is_floating_point() else None)
        if dtype is not None:
            tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        return Tensors(tensors, self.matrix)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters, without the constants among them."""
        return ((name, parameter) for name, parameter in self.named_parameters() if name not in self.constants)

    @property
    def layer(self) -> nn.Module:
        """The layer, while the branch is beside it."""
        return self.parent.base  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device | None:
        """The device of its own tensors."""
        return None if (tensor := self._first()) is None else tensor.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of its own tensors."""
        return None if (tensor := self._first()) is None else tensor.dtype

    def _first(self) -> Tensor | None:
        """A tensor of its own that has a dtype to compute in."""
        for module in (*self._modules.values(), self):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.is_floating_point() and name not in self.common:
                    return tensor
        return None

    def cast(self, x: Tensor) -> Tensor:
        """An input in the dtype of the tensors, unless autocast sees to that."""
        dtype = self.dtype
        if dtype is None or x.dtype == dtype or not x.is_floating_point():
            return x
        return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    def _label(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.method.settings().items())
        own = ", ".join(f"{key} {'×'.join(map(str, p.shape))}" for key, p in self._parameters.items() if p is not None)
        return f"({self.method.key.upper()}) {self.patch.name}({settings}){f': {own}' if own else ''}"
