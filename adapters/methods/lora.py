"""LoRA: a trained product of two thin matrices is added to the weight."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.branch import Branch, Tensors
from adapters.errors import TargetError
from adapters.forms import LowRank
from adapters.layers import CONVOLUTIONS, Matrix, is_conv1d, is_plain
from adapters.method import Method, Site, need, need_alpha, need_rank
from adapters.methods.starts import STARTS, as_matrices


@dataclass(frozen=True)
class LoRA(LowRank):
    """Low-rank adaptation.

    Args:
        rank: Rows of A and columns of B.
        alpha: The strength, `rank` when it is None. The update is scaled by `alpha / rank`.
        dropout: Probability of dropping each input of A in training; embeddings have no inputs to drop.
        rslora: Scale by `alpha / √rank` instead (arXiv:2312.03732).
        bias: Train a bias of B too, which is added to that of the layer.
        init: How A and B start, one of `adapters.methods.starts.STARTS`. Those that start at a part of the weight
            (`"pissa"`, `"olora"`) leave the weight as it is: their start is subtracted, and files hold both.

    Raises:
        AdapterError: A number is out of its range.
    """

    key = "lora"
    paper = "arXiv:2106.09685"
    formula = "W + s B A, with s = alpha / rank"
    kinds = frozenset({"linear", "convolution", "embedding", "stack"})
    fast = frozenset({"lora_B"})

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    bias: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        need_rank(self)
        need_alpha(self)
        need(0 <= self.dropout < 1, self, "a dropout of 0 or more and less than 1", self.dropout)
        need(self.init in STARTS, self, f"an init out of {', '.join(STARTS)}", self.init)

    @property
    def scaling(self) -> float:
        """`s` of the formula."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check_site(self, site: Site) -> None:
        if self.bias and not _is_layer(site.layer, site.parameter):
            raise TargetError(f"{site.path} takes no bias of B: give it a {type(self).__name__} with bias=False.")

    def check_training(self, layer: nn.Module, parameter: str) -> None:
        if self.dropout and not isinstance(layer, nn.Embedding) and not (parameter == "weight" and is_plain(layer)):
            raise TargetError(
                f"A {type(layer).__name__} is adapted through its weight, where no input can be dropped: give it a LoRA"
                " with dropout=0, or exclude it."
            )

    def build(self, site: Site, shared: dict[str, Tensor]) -> Branch:
        branch = Branch()
        groups = site.layer.groups if isinstance(site.layer, CONVOLUTIONS) else 1
        down, up = self._factors(site, groups)
        if self.dropout and not isinstance(site.layer, nn.Embedding):
            branch.append(fl.Dropout(self.dropout))
        if groups > 1:
            branch.append(GroupsToSamples(groups))
        branch.add_module("lora_A", down)
        if groups > 1:
            branch.append(SamplesToGroups(groups))
        scaling = [fl.Multiply(self.scaling)] * (self.scaling != 1)
        branch.extend([] if self.bias else scaling)  # Here, if possible, where there are only `rank` features.
        branch.add_module("lora_B", up)
        branch.extend(scaling if self.bias else [])
        if self.bias:
            nn.init.zeros_(cast(Tensor, up.bias))
        STARTS[self.init].apply(branch, site, down.weight, up.weight, self.scaling)
        return branch

    def _factors(self, site: Site, groups: int) -> tuple[fl.WeightedModule, fl.WeightedModule]:
        """A and B, as layers where the method is computed beside the layer."""
        *stack, outputs, inputs = site.shape
        layer = site.layer
        where: dict[str, Any] = {"device": site.device, "dtype": site.dtype}
        if isinstance(layer, nn.Embedding):
            down = fl.Embedding(inputs, self.rank, padding_idx=layer.padding_idx, **where)
            return down, fl.Linear(self.rank, outputs, bias=False, **where)
        if isinstance(layer, CONVOLUTIONS):
            conv = _CONVOLUTIONS[len(layer.kernel_size)]
            # One A for all groups of a convolution: only so does the update have the shape of the weight.
            geometry = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation")}
            channels = layer.in_channels // groups
            return (
                conv(channels, self.rank, **geometry, padding_mode=layer.padding_mode, use_bias=False, **where),
                conv(self.rank * groups, outputs, 1, groups=groups, use_bias=self.bias, **where),
            )
        if _is_layer(layer, site.parameter):
            return (
                fl.Linear(inputs, self.rank, bias=False, **where),
                fl.Linear(self.rank, outputs, bias=self.bias, **where),
            )
        return Factor(*stack, self.rank, inputs, **where), Factor(*stack, outputs, self.rank, **where)

    def names(self, site: Site) -> tuple[str, ...]:
        return (site.parameter, "bias") if self.bias else (site.parameter,)

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        down, up = as_matrices(t.lora_A, t.lora_B, t.matrix)
        if "start_A" in t:
            down, up = torch.cat([down, t.start_A], -2), torch.cat([up, -t.start_B], -1)
        return up * self.scaling, down

    def update_bias(self, bias: Tensor, weight: Tensor, t: Tensors) -> Tensor:
        return bias + self.scaling * t["lora_B.bias"]

    def beside(self, layer: nn.Module, matrix: Matrix) -> bool:
        return not STARTS[self.init].moves

    def run(self, branch: Branch, layer: Callable[..., Any], scale: float, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output: Tensor = layer(x, *args, **kwargs)
        return output + (branch.forward(branch.cast(x)) * scale).to(output.dtype)

    def hyperparameters(self) -> dict[str, Any]:
        return {name: value for name, value in super().hyperparameters().items() if name != "init"}

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        tensors = {name: t for name, t in branch.tensors().items() if not name.startswith("start_")}
        if branch.matrix.kind == "embedding":
            return {"lora_embedding_A": tensors["lora_A"].T, "lora_embedding_B": tensors["lora_B"]}
        return tensors

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        return STARTS[self.init].saved(self, branch)


def _is_layer(layer: nn.Module, parameter: str) -> bool:
    return parameter == "weight" and (isinstance(layer, (nn.Linear, *CONVOLUTIONS)) or is_conv1d(layer))


_CONVOLUTIONS: dict[int, Any] = {1: fl.Conv1d, 2: fl.Conv2d, 3: fl.Conv3d}


class Factor(fl.WeightedModule):
    """A factor of an update that is only ever added to a weight."""

    def __init__(self, *shape: int, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.shape = shape
        self.weight = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))


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
