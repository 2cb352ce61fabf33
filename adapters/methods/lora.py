"""LoRA: a trained product of two thin matrices is added to the weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.errors import TargetError
from adapters.layers.matrix import Matrix
from adapters.layers.weight import is_plain
from adapters.lowrank.low_rank import LowRank
from adapters.methods.core import formulas
from adapters.methods.core.arithmetic import Scale, add_scaled
from adapters.methods.core.checks import (
    alpha_of,
    need,
    need_alpha,
    need_choice,
    need_dropout,
    need_rank,
    refuse_dropout,
)
from adapters.methods.core.factors import (
    GroupsToSamples,
    Linear,
    SamplesToGroups,
    as_matrices,
    factors,
    groups_of,
    is_layer,
)
from adapters.methods.core.init import INITS, InitName
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors
from fluxion.calls import entry


@dataclass(frozen=True)
class LoRA(formulas.LowRank):
    """Low-rank adaptation.

    Args:
        rank: Rows of A and columns of B.
        alpha: The strength, `rank` when it is None. The update is scaled by `alpha / rank`.
        dropout: Probability of dropping each input of A in training; embeddings have no inputs to drop.
        rslora: Scale by `alpha / √rank` instead (arXiv:2312.03732).
        bias: Train a bias of B too, which is added to that of the layer.
        init: The initialisation of A and B, one of `adapters.methods.core.init.INITS`. Those at a part of the weight
            (`"pissa"`, `"olora"`, `"corda"`, `"corda_kpm"`, `"lora_ga"`) leave the weight as it is: the initial product
            is subtracted, and files hold both. Those from data (`"eva"`, `"corda"`, `"corda_kpm"`, `"lora_ga"`,
            `"loftq"`) are `"kaiming"` until `adapters.initialize` is called.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.LoRA(rank=4, alpha=8))
        >>> patch.scale = 0.5
        >>> patch.save_pretrained("lora")
    """

    key = "lora"
    paper = "arXiv:2106.09685"
    formula = "W + s B A, with s = alpha / rank"
    kinds = frozenset({"linear", "convolution", "embedding", "stack"})
    plus_lr = frozenset({"lora_B"})
    is_low_rank = True  # `run` below is a faster way to the same.

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    rslora: bool = False
    bias: bool = False
    init: InitName = "kaiming"

    def __post_init__(self) -> None:
        need_rank(self)
        need_alpha(self)
        need_dropout(self)
        need_choice(self, "init", INITS)
        zero_or_alpha = self.alpha != 0 or not INITS[self.init].divides
        need(zero_or_alpha, self, f"an alpha other than 0 for init={self.init!r}", self.alpha)

    @property
    def scaling(self) -> float:
        """`s` of the formula."""
        return alpha_of(self) / (math.sqrt(self.rank) if self.rslora else self.rank)

    def check_spec(self, spec: WeightSpec) -> None:
        if not self.bias and not INITS[self.init].needs:
            return
        if self.bias and not is_layer(spec.layer, spec.parameter):
            raise TargetError(f"{spec.path} takes no bias of B: give it a LoRA with bias=False.")
        if INITS[self.init].needs == "inputs" and not is_layer(spec.layer, spec.parameter):
            raise TargetError(
                f"{spec.path} has no inputs that its weight is multiplied by, as init={self.init!r} needs: give it"
                " another init, or exclude it."
            )

    def check_training(self, layer: nn.Module, parameter: str) -> None:
        if self.dropout and not isinstance(layer, nn.Embedding) and not (parameter == "weight" and is_plain(layer)):
            refuse_dropout(self, layer)

    def build(self, spec: WeightSpec, shared: dict[str, Tensor]) -> Branch:
        branch, groups = Branch(), groups_of(spec.layer)
        down, up = factors(spec, self.rank, self.bias)
        if self.dropout and not isinstance(spec.layer, nn.Embedding):
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
        INITS[self.init].apply(branch, spec, down.weight, up.weight, self.scaling)
        return branch

    def initial_values(
        self, specs: Sequence[WeightSpec], like: Mapping[str, Tensor]
    ) -> Iterable[Sequence[Tensor]] | None:
        count = len(specs)
        made = {name: tensor.new_zeros(count, *tensor.shape) for name, tensor in like.items()}
        down, up = made["lora_A.weight"], made["lora_B.weight"]
        a, b = as_matrices(like["lora_A.weight"], like["lora_B.weight"], specs[0].matrix)
        INITS[self.init].fill(specs[0], down.view(count, *a.shape), up.view(count, *b.shape), self.scaling)
        return zip(*made.values(), strict=True)

    def changes(self, spec: WeightSpec) -> tuple[str, ...]:
        return (spec.parameter, "bias") if self.bias else (spec.parameter,)

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        down, up = as_matrices(t.lora_A, t.lora_B, t.matrix)
        if "start_A" in t:
            down, up = torch.cat([down, t.start_A], -2), torch.cat([up, -t.start_B], -1)
        return up if self.scaling == 1 else up * self.scaling, down

    def update_bias(self, bias: Tensor | None, weight: Tensor, t: Tensors) -> Tensor | None:
        added = self.scaling * t["lora_B.bias"]
        return added if bias is None else bias + added

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        return not INITS[self.init].subtracted

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        output: Tensor = layer(x, *args, **kwargs)
        return add_scaled(output, entry(branch)(branch.cast(x)).to(output.dtype), scale)

    def low_rank(self, branch: Branch) -> LowRank | None:
        kinds = {"Dropout": fl.Dropout, "lora_A": Linear, "Multiply": fl.Multiply, "lora_B": Linear}
        if not self.dropout:
            del kinds["Dropout"]
        if self.scaling == 1:
            del kinds["Multiply"]
        parts: dict[str, Any] = branch._modules
        found = [(name, type(part)) for name, part in parts.items()]
        if not self.is_low_rank or self.bias or found != [*kinds.items()]:
            return None
        factors = [parts[name]._parameters for name in ("lora_A", "lora_B")]
        multiply = vars(parts["Multiply"]) if "Multiply" in kinds else {"scale": 1.0, "bias": 0.0}
        dropout = vars(parts["Dropout"]) if "Dropout" in kinds else {"p": 0.0}
        scale, offset, rate = multiply.get("scale"), multiply.get("bias"), dropout["p"]
        numbers = type(scale) in (float, int) and type(offset) in (float, int)  # They may be tensors or parameters.
        if not numbers or offset != 0 or rate >= 1 or any(own.get("bias", self) is not None for own in factors):
            return None
        down, up = (own.get("weight") for own in factors)
        if down is None or up is None:
            return None
        return LowRank(up, down, cast(float, scale), rate if dropout.get("training") else 0.0)

    def hyperparameters(self) -> dict[str, Any]:
        return {name: value for name, value in super().hyperparameters().items() if name != "init"}

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        tensors = {name: t for name, t in branch.tensors().items() if not name.startswith("start_")}
        if branch.matrix.kind == "embedding":
            tensors["lora_embedding_A"], tensors["lora_embedding_B"] = tensors.pop("lora_A").T, tensors.pop("lora_B")
        return tensors

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        """Plain LoRA: where the initial product is subtracted, of twice the rank, with the initial factors as well."""
        tensors = self.file_tensors(branch)
        if not INITS[self.init].subtracted:
            return self, tensors
        a, b = sorted(name for name in tensors if name.endswith(("_A", "_B")))
        down, up = tensors[a], tensors[b]
        start_a, start_b = branch.start_A.view_as(down), branch.start_B.view_as(up)
        rank = 2 * self.rank
        alpha = self.scaling * (rank**0.5 if self.rslora else rank)
        stack = int(down.ndim == 3 and len(branch.matrix.shape) == 3)
        tensors |= {a: torch.cat([down, start_a], stack), b: torch.cat([up, -start_b], 1 + stack)}
        return replace(self, rank=rank, alpha=alpha, init="kaiming"), tensors
