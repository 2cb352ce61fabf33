"""DoRA's tensors in foreign files: those of LoRA, and the lengths of the rows or columns of the weight."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from weights.adapter_file import LayerWeights
from weights.methods import lora
from weights.methods.core.lycoris import LycorisLayout, Read, Tensors, Written, side_of
from weights.methods.core.rows import RowAxes

_LENGTHS = "lora_magnitude_vector"


def _peft_problem(layer: LayerWeights) -> str | None:
    """The problem of A and B, or of what PEFT does not have."""
    if layer.hyperparameters.get("on_inputs"):
        return "lengths of the inputs, where PEFT has those of outputs"
    return lora.peft_problem(layer)


def _read(tensors: Tensors, alpha: float | None) -> Read:
    hyperparameters, factors = lora.read(tensors, alpha)
    lengths = tensors[_LENGTHS]
    hyperparameters |= side_of(lengths)
    shaped = lengths.flatten() if factors["lora_A"].ndim == 2 else _shaped(lengths, factors["lora_A"], axis=1)
    return hyperparameters, {**factors, _LENGTHS: shaped}


def _write(layer: LayerWeights) -> Written:
    tensors, alpha = lora.write(layer)
    axis = int(bool(layer.hyperparameters.get("on_inputs")))
    return {**tensors, _LENGTHS: _shaped(layer.tensors[_LENGTHS], layer.tensors["lora_A"], axis)}, alpha


def _shaped(lengths: Tensor, like: Tensor, axis: int) -> Tensor:
    """Lengths in one dimension of as many as a weight has, the others of size 1."""
    return lengths.reshape([-1 if dimension == axis else 1 for dimension in range(like.ndim)])


PEFT = replace(
    lora.PEFT,
    method="dora",
    tensors={**lora.PEFT.tensors, _LENGTHS: _LENGTHS},
    aliases={f"{_LENGTHS}.weight": _LENGTHS},
    fixed={**lora.PEFT.fixed, "use_dora": (True,)},
    said=frozenset({"use_dora"}),
    check=_peft_problem,
)

LYCORIS = LycorisLayout(
    "dora",
    sets=(frozenset({"lora_A", "lora_B", _LENGTHS}), frozenset({"lora_A", "lora_B", "lora_mid", _LENGTHS})),
    names=lora.NAMES,
    spellings={
        "dora_scale": (
            "magnitude",
            *(f"lora_magnitude_vector{end}" for end in ("", ".weight", ".default", ".default.weight")),
        )
    },
    vectors=frozenset({_LENGTHS}),
    read=_read,
    write=_write,
)

ROWS = RowAxes("dora", by_row=f"lora_B {_LENGTHS}", common="lora_A", own_rank=lora.own_rank)
