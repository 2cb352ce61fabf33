"""How keys of tensors are made of the name of a layer and the end that says which of its tensors it is.

The ends are those of LyCORIS and kohya's scripts, for which other programs have other spellings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from weights.formats.lycoris_methods import GRAMMARS

ALPHA = "alpha"
LARGER = "reshape_weight"
BIASES = {end: grammar.end(name) for grammar in GRAMMARS for name, end in grammar.bias.items()}
_OWN = {ALPHA, LARGER, *BIASES, *(end for grammar in GRAMMARS for end in grammar.ends)}
_SPELLINGS: Mapping[str, Iterable[str]] = {
    **{
        f"lora_{end}.weight": (
            f"lora_{letter}",
            f"lora_{letter}.weight",
            f"lora_{letter}.default.weight",
            f"lora.{end}.weight",
            f"lora_linear_layer.{end}.weight",
        )
        for end, letter in (("down", "A"), ("up", "B"))
    },
    "lora_up.bias": ("lora_B.bias", "lora_B.default.bias"),
    "dora_scale": (
        "magnitude",
        *(f"lora_magnitude_vector{end}" for end in ("", ".weight", ".default", ".default.weight")),
    ),
}
_ENDS = {end: end for end in _OWN} | {spelling: end for end, names in _SPELLINGS.items() for spelling in names}
_MOST_NAMES = max(end.count(".") for end in _ENDS) + 1
# The oldest spelling: the processor of an attention has layers called `to_q_lora`, or with XLabs `qkv_lora1`.
_PROCESSOR_ENDS = {"down.weight": "lora_down.weight", "up.weight": "lora_up.weight"}
_PROCESSOR = re.compile(r"(.+)_lora([12]?)")
# Parameters of base models have these names too.
_COMMON = {ALPHA, "weight"}


def split(key: str) -> tuple[str, str] | None:
    """The layer that a key names, and the end in LyCORIS' spelling, the longest there is; None for another kind."""
    _, *ends = key.rsplit(".", _MOST_NAMES)
    for first in range(len(ends)):
        end = ".".join(ends[first:])
        if end in _ENDS:
            return key[: -len(end) - 1], _ENDS[end]
        if end in _PROCESSOR_ENDS and (layer := _PROCESSOR.fullmatch(key[: -len(end) - 1])):
            return "".join(layer.groups()), _PROCESSOR_ENDS[end]
    return None


def stems(keys: Iterable[str]) -> dict[str, bool]:
    """What keys call layers, and whether there is one for a tensor that only adapters have."""
    called: dict[str, bool] = {}
    for stem, end in filter(None, map(split, keys)):
        called[stem] = called.get(stem, False) or end not in _COMMON
    return called
