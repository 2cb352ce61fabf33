"""Keys made of the name of a layer and an end, which tells the tensors of the layer apart.

The ends are those of LyCORIS and kohya's scripts; other programs spell them in other ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache

from weights.methods.core.lycoris import lycoris_layouts

ALPHA = "alpha"
LARGER = "reshape_weight"
# The oldest spelling: the processor of an attention has layers called `to_q_lora`, or with XLabs `qkv_lora1`.
_PROCESSOR_ENDS = {"down.weight": "lora_down.weight", "up.weight": "lora_up.weight"}
_PROCESSOR = re.compile(r"(.+)_lora([12]?)")
# Parameters of base models have these names too.
_COMMON = {ALPHA, "weight"}


@cache
def biases() -> Mapping[str, str]:
    """For the end of a tensor that changes the bias of a layer, the end of its counterpart for the weight."""
    return {end: layout.end(name) for layout in lycoris_layouts() for name, end in layout.bias.items()}


@cache
def _ends() -> Mapping[str, str]:
    """The ends in all spellings, and each in LyCORIS's."""
    own = {ALPHA, LARGER, *biases(), *(end for layout in lycoris_layouts() for end in layout.ends)}
    spelled = [(end, names) for layout in lycoris_layouts() for end, names in layout.spellings.items()]
    return {end: end for end in own} | {name: end for end, names in spelled for name in names}


@cache
def _most_names() -> int:
    return max(end.count(".") for end in _ends()) + 1


def split(key: str) -> tuple[str, str] | None:
    """The layer that a key names, and the longest end there is, in LyCORIS's spelling; None for another kind of key.

    Example:
        >>> split("unet.fc.lora_A.weight")
        ('unet.fc', 'lora_down.weight')
    """
    known = _ends()
    _, *ends = key.rsplit(".", _most_names())
    for first in range(len(ends)):
        end = ".".join(ends[first:])
        if end in known:
            return key[: -len(end) - 1], known[end]
        if end in _PROCESSOR_ENDS and (layer := _PROCESSOR.fullmatch(key[: -len(end) - 1])):
            return "".join(layer.groups()), _PROCESSOR_ENDS[end]
    return None


def stems(keys: Iterable[str]) -> dict[str, bool]:
    """The layers that keys name, and whether one has a tensor that only adapters have."""
    called: dict[str, bool] = {}
    for stem, end in filter(None, map(split, keys)):
        called[stem] = called.get(stem, False) or end not in _COMMON
    return called
