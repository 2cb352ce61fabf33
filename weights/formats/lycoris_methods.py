"""How LyCORIS writes each method: the ends of the tensors' names, and what the tensors say of its numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weights.adapter_file import Hyperparameter, LayerWeights

Tensors = Mapping[str, Tensor]
Read = tuple[dict[str, Hyperparameter], dict[str, Tensor]]
Written = tuple[dict[str, Tensor], float | None]


@dataclass(frozen=True)
class Grammar:
    """One method in the files of LyCORIS.

    Attributes:
        method: The key of the method.
        names: For a tensor whose name in the file is another, the end of that.
        sets: The tensors that a layer may have together.
        read: The hyperparameters and the tensors, from the tensors of a file and its alpha, or None where it has none.
            Raises a ValueError that says what does not fit.
        write: The reverse. Raises a ValueError that says what the format has no place for.
        has_alpha: Whether a layer may have an alpha.
    """

    method: str
    sets: Collection[frozenset[str]]
    read: Callable[[Tensors, float | None], Read]
    write: Callable[[LayerWeights], Written]
    names: Mapping[str, str] = field(default_factory=dict)
    has_alpha: bool = True

    @property
    def ends(self) -> dict[str, str]:
        """The name of a tensor by the end of its name in a file."""
        return {self.names.get(name, name): name for names in self.sets for name in names}


def _alpha(alpha: float | None, rank: int) -> float:
    """That of a file: none and 0 both stand for the rank, in LyCORIS as in kohya's scripts."""
    return alpha or float(rank)


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    """A multiple, not rounded to half precision."""
    return tensor if scale == 1 else tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * scale


def _with_alpha(layer: LayerWeights, factor: str) -> Written:
    """The tensors and the alpha of a layer, of which one tensor takes in what an alpha of 0 cannot say."""
    rank, alpha = _number(layer, "rank"), _number(layer, "alpha")
    if alpha:
        return dict(layer.tensors), alpha
    return {**layer.tensors, factor: _scaled(layer.tensors[factor], 0.0)}, rank


def _number(layer: LayerWeights, name: str) -> float:
    value = layer.hyperparameters.get(name)
    if not isinstance(value, int | float):
        raise ValueError(f"no {name}")
    return value


def _read_lora(tensors: Tensors, alpha: float | None) -> Read:
    down, up = tensors["lora_A"], tensors["lora_B"]
    core = tensors.get("lora_mid")
    rank = down.shape[0]
    if core is not None:
        if core.shape[:2] != (rank, rank):
            raise ValueError(f"a lora_mid {tuple(core.shape)} that does not fit rank {rank}")
        # Each position of the kernel has its own mixture of the rows of A: as if A had been a convolution.
        wide = torch.promote_types(down.dtype, torch.float32)
        down = torch.einsum("pq...,qc->pc...", core.to(wide), down.flatten(1).to(wide))
    return {"rank": rank, "alpha": _alpha(alpha, rank)}, {"lora_A": down, "lora_B": up}


def _write_lora(layer: LayerWeights) -> Written:
    rank, (a, b) = layer.hyperparameters.get("rank"), (layer.tensors["lora_A"].shape, layer.tensors["lora_B"].shape)
    if a[0] != rank or b[1] != rank or not set(b[2:]) <= {1}:
        raise ValueError(f"lora_A {tuple(a)} and lora_B {tuple(b)}, which are no matrices of rank {rank}")
    tensors, alpha = _with_alpha(layer, "lora_B")
    # There is no word for rsLoRA: the alpha of plain LoRA says the same.
    return tensors, alpha * math.sqrt(_number(layer, "rank")) if alpha and layer.hyperparameters.get(
        "rslora"
    ) else alpha


def _read_loha(tensors: Tensors, alpha: float | None) -> Read:
    rank = tensors["hada_w1_b"].shape[0]
    return {"rank": rank, "alpha": _alpha(alpha, rank), "tucker": "hada_t1" in tensors}, dict(tensors)


def _write_loha(layer: LayerWeights) -> Written:
    return _with_alpha(layer, "hada_w1_a")


def _read_lokr(tensors: Tensors, alpha: float | None) -> Read:
    """Of two whole factors, the alpha is of no account: it may be anything."""
    first = (tensors.get("lokr_w1_a", tensors.get("lokr_w1")), tensors.get("lokr_w1_b", tensors.get("lokr_w1")))
    decomposed = [tensors[name] for name in ("lokr_w1_b", "lokr_w2_b") if name in tensors]
    ranks = {factor.shape[0] for factor in decomposed} or {max(tensors["lokr_w2"].shape[:2])}
    if len(ranks) > 1:
        raise ValueError(f"factors of the ranks {', '.join(map(str, sorted(ranks)))}")
    (rank,) = ranks
    numbers: dict[str, Any] = {
        "rank": rank,
        "alpha": _alpha(alpha if decomposed else None, rank),
        "factor": (first[0].shape[0], first[1].shape[1]),  # type: ignore[union-attr]
        "decompose_both": "lokr_w1_a" in tensors,
        "tucker": "lokr_t2" in tensors,
    }
    return numbers, dict(tensors)


def _write_lokr(layer: LayerWeights) -> Written:
    tensors, alpha = _with_alpha(layer, "lokr_w1" if "lokr_w1" in layer.tensors else "lokr_w1_a")
    rank = _number(layer, "rank")
    if alpha is not None and {"lokr_w1", "lokr_w2"} <= tensors.keys():
        return {**tensors, "lokr_w1": _scaled(tensors["lokr_w1"], alpha / rank)}, rank
    return tensors, alpha


_HADA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_KRON_FIRST = (frozenset({"lokr_w1"}), frozenset({"lokr_w1_a", "lokr_w1_b"}))
_KRON_SECOND = (
    frozenset({"lokr_w2"}),
    frozenset({"lokr_w2_a", "lokr_w2_b"}),
    frozenset({"lokr_w2_a", "lokr_w2_b", "lokr_t2"}),
)

GRAMMARS: tuple[Grammar, ...] = (
    Grammar(
        "lora",
        sets=(frozenset({"lora_A", "lora_B"}), frozenset({"lora_A", "lora_B", "lora_mid"})),
        names={"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_mid": "lora_mid.weight"},
        read=_read_lora,
        write=_write_lora,
    ),
    Grammar("loha", sets=(_HADA, _HADA | {"hada_t1", "hada_t2"}), read=_read_loha, write=_write_loha),
    Grammar(
        "lokr",
        sets=[first | second for first in _KRON_FIRST for second in _KRON_SECOND],
        read=_read_lokr,
        write=_write_lokr,
    ),
)
"""Every method that LyCORIS's files can hold."""
