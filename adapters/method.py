"""What a method is: hyperparameters, and how they become a branch beside a layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.layers import Matrix

if TYPE_CHECKING:
    from adapters.patch import Patch


@dataclass(frozen=True)
class Method(ABC):
    """The hyperparameters of an adapter. Subclasses are frozen dataclasses, one per file of `adapters.methods`.

    Attributes:
        key: The name of the method in files.
        fast: The tensors that may learn faster than the others.
    """

    key: ClassVar[str]
    fast: ClassVar[frozenset[str]] = frozenset()

    def supports(self, layer: nn.Module, parameter: str) -> bool:
        """Whether this method can adapt that weight of that layer."""
        return Matrix.of(layer, parameter) is not None

    def check_training(self, layer: nn.Module, parameter: str) -> None:  # noqa: B027 - most refuse nothing
        """Raise a TargetError where these hyperparameters cannot be kept in training."""

    @abstractmethod
    def build(self, layer: nn.Module, matrix: Matrix, device: torch.device, dtype: torch.dtype) -> Branch:
        """A branch for one weight of a layer, initialised so that it changes nothing yet.

        Args:
            layer: The layer.
            matrix: What its weight is as a matrix.
            device: Where the tensors go.
            dtype: Their dtype.

        Raises:
            TargetError: The hyperparameters do not fit this layer.
        """

    def hyperparameters(self) -> dict[str, Any]:
        """What a file needs to say besides the tensors."""
        return asdict(self)


class Branch(fl.Chain):
    """The part of one patch at one weight of a layer.

    Called, it computes what it adds to the output of the layer, at scale 1; `adapt` states the same as a change of the
    weight. The tensors are its parameters.

    Attributes:
        method: The hyperparameters.
        matrix: What the weight is as a matrix.
        parameter: The name of the weight in its layer.
        patch: The patch it belongs to.
        tied: Whether its tensors are those of another branch, at another use of the same weight.
        additive: Whether `adapt` adds to the weight what does not depend on it. Then branches can be combined.
    """

    additive: ClassVar[bool] = False
    method: Method
    matrix: Matrix
    parameter: str
    patch: Patch
    tied: bool = False

    def adapt(self, weight: Tensor, scale: float) -> Tensor:
        """The weight of a layer that computes what the layer of this weight and this branch compute together.

        Args:
            weight: In the precision to compute in, of the shape of the layer's weight. It is not changed.
            scale: The strength, 1 for the method as its paper states it.
        """
        raise NotImplementedError

    def factors(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """`(up, down)` where the method adds `up @ down` of low rank to the matrix of the weight, else None.

        Args:
            scale: The strength, 1 for the method as its paper states it.
            dtype: The precision to compute in.

        Returns:
            Tensors of shapes `(outputs, rank)` and `(rank, inputs)`, with the experts in front for a stack.
        """
        return None

    def run(self, layer: Callable[..., Any], scale: float, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The output of a layer together with this branch.

        Args:
            layer: Computes the output without it.
            scale: The strength, 1 for the method as its paper states it.
            x: The input of the layer, with whatever else it takes.
        """
        output: Tensor = layer(x, *args, **kwargs)
        if x.dtype != self.dtype and x.is_floating_point() and not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.dtype)
        return output + (self.forward(x) * scale).to(output.dtype)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of the tensors."""
        return next((p.dtype for child in self for p in child._parameters.values() if p is not None), None)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors under the names that files give them."""
        return {name.removesuffix(".weight"): parameter for name, parameter in self.named_parameters()}

    def _label(self) -> str:
        settings = ", ".join(f"{key}={value}" for key, value in self.method.hyperparameters().items() if value)
        return f"{self.patch.name}({settings})"
