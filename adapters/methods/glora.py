"""GLoRA: the weight and the bias are each multiplied and added to, and the weight is added to the bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.methods.core.checks import need_choice, need_rank
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors

_A_B = ("lora", "vector", "constant", "none")
_C = ("lora", "vector", "none")
_D_E = ("vector", "constant", "none")


@dataclass(frozen=True)
class GLoRA(Method):
    """Generalised low-rank adaptation.

    Each of A to E is a product of low rank (`"lora"`), one number per output, for C per input (`"vector"`), a single
    number (`"constant"`), or zero (`"none"`). A layer without a bias has A and B only.

    Args:
        rank: Rank of the products.
        config_a_b: The kind of A and B: `"lora"`, `"vector"`, `"constant"` or `"none"`.
        config_c: The kind of C: `"lora"`, `"vector"` or `"none"`.
        config_d_e: The kind of D and E: `"vector"`, `"constant"` or `"none"`.

    Raises:
        AdapterError: The rank is not an integer of 1 or more, or one of the others is none of its choices.

    Example:
        >>> patch = adapters.inject(model, adapters.GLoRA(rank=4, config_c="vector"))
        >>> patch.merge()
        >>> patch.save_pretrained("glora")
    """

    key = "glora"
    paper = "arXiv:2306.07967"
    formula = "W + W ∘ A + B, and b + b ∘ D + E + W C"
    plus_lr = frozenset({"glora_A_Xd", "glora_B_Xd", "glora_C_Xd"})

    rank: int = 8
    config_a_b: str = "lora"
    config_c: str = "lora"
    config_d_e: str = "constant"

    def __post_init__(self) -> None:
        need_rank(self)
        for name, choices in (("config_a_b", _A_B), ("config_c", _C), ("config_d_e", _D_E)):
            need_choice(self, name, choices)

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for letter, (form, shape) in self._parts(spec.shape, spec.has_bias).items():
            name = f"glora_{letter}_X"
            if form == "lora":
                found |= {f"{name}d": spec.zeros(shape[0], self.rank), f"{name}u": spec.uniform(self.rank, shape[1])}
            elif form == "vector":
                found[name] = spec.zeros(shape[0], *(1 for _ in shape[1:]))
            elif form == "constant":
                found[name] = spec.zeros(1)
        return found

    def _parts(self, matrix: tuple[int, ...], has_bias: bool) -> dict[str, tuple[str, tuple[int, ...]]]:
        """The kind and the full shape of each of A to E."""
        outputs, inputs = matrix
        c, d_e = (self.config_c, self.config_d_e) if has_bias else ("none", "none")
        return {
            "A": (self.config_a_b, (outputs, inputs)),
            "B": (self.config_a_b, (outputs, inputs)),
            "C": (c, (inputs, 1)),
            "D": (d_e, (outputs,)),
            "E": (d_e, (outputs,)),
        }

    def changes(self, spec: WeightSpec) -> tuple[str, ...]:
        return (spec.parameter, str(spec.bias_name)) if spec.has_bias else (spec.parameter,)

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        return weight + weight * _part(t, "A") + _part(t, "B")

    def update_bias(self, bias: Tensor | None, weight: Tensor, t: Tensors) -> Tensor | None:
        if bias is None:
            return None
        c = _part(t, "C")
        coupled = (weight @ c).squeeze(1) if isinstance(c, Tensor) else c
        return bias + bias * _part(t, "D") + _part(t, "E") + coupled

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors, and full zeros for those that are `"none"`, as files have them."""
        tensors = super().file_tensors(branch)
        for letter, (form, shape) in self._parts(branch.matrix.shape, len(branch.names) > 1).items():
            if form == "none":
                tensors[f"glora_{letter}_zeros"] = torch.zeros(shape, dtype=branch.dtype)
        return tensors


def _part(t: Tensors, letter: str) -> Tensor | float:
    """One of A to E, in a shape that broadcasts to that in full."""
    name = f"glora_{letter}_X"
    if f"{name}d" in t:
        return t[f"{name}d"] @ t[f"{name}u"]
    return t.get(name, 0.0)
