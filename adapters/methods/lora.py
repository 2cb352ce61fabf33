"""LoRA: `W + s B A`, with `s = alpha / rank` (arXiv:2106.09685), or `alpha / √rank` for rsLoRA (arXiv:2312.03732)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.errors import AdapterError, TargetError
from adapters.layers import CONVOLUTIONS, Matrix, is_conv1d, is_plain
from adapters.method import Branch, Method


@dataclass(frozen=True)
class LoRA(Method):
    """Low-rank adaptation.

    Args:
        rank: Rows of A and columns of B.
        alpha: The strength, `rank` when it is None. The update is scaled by `alpha / rank`.
        dropout: Probability of dropping each input of A in training; embeddings have no inputs to drop.
        rslora: Scale by `alpha / √rank` instead.

    Raises:
        AdapterError: A number is out of its range.
    """

    key = "lora"
    fast = frozenset({"lora_B"})

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise AdapterError(f"LoRA needs a rank that is an integer of 1 or more, not {self.rank!r}.")
        if self.alpha is None:
            object.__setattr__(self, "alpha", float(self.rank))
        elif not isinstance(self.alpha, (int, float)) or not math.isfinite(self.alpha):
            raise AdapterError(f"LoRA needs an alpha that is a finite number, not {self.alpha!r}.")
        if not 0 <= self.dropout < 1:
            raise AdapterError(f"LoRA needs a dropout of 0 or more and less than 1, not {self.dropout!r}.")

    @property
    def scaling(self) -> float:
        """`s` of the formula."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check_training(self, layer: nn.Module, parameter: str) -> None:
        if isinstance(layer, nn.Embedding):
            return
        if self.dropout and not (parameter == "weight" and is_plain(layer)):
            raise TargetError(
                f"A {type(layer).__name__} is adapted through its weight, where no input can be dropped: give it a LoRA"
                " with dropout=0, or exclude it."
            )

    def build(self, layer: nn.Module, matrix: Matrix, device: torch.device, dtype: torch.dtype) -> Branch:
        branch = LoRABranch()
        groups = getattr(layer, "groups", 1) if isinstance(layer, CONVOLUTIONS) else 1
        down, up = self._factors(layer, matrix, groups, {"device": device, "dtype": dtype})
        if self.dropout and not isinstance(layer, nn.Embedding):
            branch.append(fl.Dropout(self.dropout))
        if groups > 1:
            branch.append(GroupsToSamples(groups))
        branch.add_module("lora_A", down)
        if groups > 1:
            branch.append(SamplesToGroups(groups))
        if self.scaling != 1:
            branch.append(fl.Multiply(self.scaling))  # Here, where there are only `rank` features.
        branch.add_module("lora_B", up)
        return branch

    def _factors(
        self, layer: nn.Module, matrix: Matrix, groups: int, where: dict[str, Any]
    ) -> tuple[fl.WeightedModule, fl.WeightedModule]:
        """A, Kaiming-uniform as in the paper's code, and B, zero; for embeddings zero and normal, as in PEFT."""
        *stack, outputs, inputs = matrix.shape
        down: fl.WeightedModule
        up: fl.WeightedModule
        if isinstance(layer, nn.Embedding):
            down = fl.Embedding(inputs, self.rank, padding_idx=layer.padding_idx, **where)
            up = fl.Linear(self.rank, outputs, bias=False, **where)
            nn.init.zeros_(down.weight)
            nn.init.normal_(up.weight)
            return down, up
        if isinstance(layer, CONVOLUTIONS):
            conv = _CONVOLUTIONS[len(layer.kernel_size)]
            # One A for all groups of a convolution: only so does the update have the shape of the weight.
            geometry = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
            channels = layer.in_channels // groups
            down = conv(channels, self.rank, **geometry, padding_mode=layer.padding_mode, use_bias=False, **where)
            up = conv(self.rank * groups, outputs, 1, groups=groups, use_bias=False, **where)
        elif isinstance(layer, nn.Linear) or is_conv1d(layer):
            down = fl.Linear(inputs, self.rank, bias=False, **where)
            up = fl.Linear(self.rank, outputs, bias=False, **where)
        else:
            down = Factor(*stack, self.rank, inputs, **where)
            up = Factor(*stack, outputs, self.rank, **where)
        nn.init.zeros_(up.weight)
        return down, up


_CONVOLUTIONS: dict[int, Any] = {1: fl.Conv1d, 2: fl.Conv2d, 3: fl.Conv3d}


class LoRABranch(Branch):
    """`x ↦ s B A x`, and `W ↦ W + s B A`."""

    _tag = "LORA"
    additive = True
    method: LoRA

    def adapt(self, weight: Tensor, scale: float) -> Tensor:
        up, down = self.factors(scale, weight.dtype)
        matrix = self.matrix.read(weight)
        add = torch.baddbmm if matrix.ndim == 3 else torch.addmm
        return self.matrix.write(add(matrix, up, down), like=weight)

    def factors(self, scale: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        tensors = {name[-1]: tensor.to(dtype) for name, tensor in self.tensors().items()}
        down, up = (t if len(self.matrix.shape) == 3 else t.flatten(1) for t in (tensors["A"], tensors["B"]))
        return up * (scale * self.method.scaling), down

    def tensors(self) -> dict[str, Tensor]:
        down, up = self.lora_A, self.lora_B
        if isinstance(down, nn.Embedding):
            return {"lora_embedding_A": down.weight.T, "lora_embedding_B": up.weight}
        return {"lora_A": down.weight, "lora_B": up.weight}


class Factor(fl.WeightedModule):
    """A factor of an update that is only ever added to a weight."""

    def __init__(self, *shape: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
        bound = 1 / math.sqrt(shape[-1])
        nn.init.uniform_(self.weight, -bound, bound)


class GroupsToSamples(fl.Module):
    """`(batch, groups * channels, height, width)` to `(batch * groups, channels, height, width)`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.groups, -1)).flatten(0, 1)


class SamplesToGroups(fl.Module):
    """`(batch * groups, channels, height, width)` to `(batch, groups * channels, height, width)`."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.groups = groups

    def forward(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.groups)).flatten(1, 2)
