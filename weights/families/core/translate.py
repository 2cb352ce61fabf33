"""The layers of diffusers and transformers that a layer of an original model stands for.

A file of kohya's scripts, of ComfyUI or of ai-toolkit names the layers of a model as its makers published it:
`double_blocks.0.img_attn.qkv`. The model that it is put into may have other names, and several layers in place of one:
`transformer_blocks.0.attn.to_q`, `.to_k` and `.to_v`. The tables are those of the families.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from weights.families.core.family import families


class Part(NamedTuple):
    """Some rows of a layer, each of which makes one output.

    Attributes:
        path: The layer.
        block: Which of several equal blocks of its rows, counted from 1; 0 for none of them: the layer only tells
            which model it is.
        blocks: How many blocks it has.
    """

    path: str
    block: int = 1
    blocks: int = 1


def translate(name: str, *, flattened: bool) -> list[tuple[Part, ...]]:
    """The layers that a layer of an original model may be in a model of diffusers or transformers.

    Args:
        name: The path of the layer, or of its bias.
        flattened: Whether it has `_` in place of every `.`.

    Returns:
        For each model that may be meant, the parts that together have the rows of the layer, in their order, with
        dotted paths. The first of which the model has all layers is the one.
    """
    names = _split(name, flattened)
    suffix = ".bias" if names and names[-1] == "bias" else ""
    key, numbers = _key(names[:-1] if suffix else names)
    found: dict[tuple[Part, ...], None] = {}
    for wanted, parts in _index(flattened).get(key, ()):
        if all(want in ("{i}", number) for want, number in zip(wanted, numbers, strict=True)):
            free = next((number for want, number in zip(wanted, numbers, strict=True) if want == "{i}"), "")
            found[tuple(part._replace(path=part.path.replace("{i}", free) + suffix) for part in parts)] = None
    return list(found)


_Index = dict[tuple[str, ...], list[tuple[list[str], tuple[Part, ...]]]]
_BLOCK = re.compile(r"(.*)\[(\d+)/(\d+)\]")


@cache
def _index(flattened: bool) -> _Index:
    """The entries of all tables by the names without numbers: the numbers of each, and the parts."""
    index: _Index = {}
    for table in (table for family in families() for table in family.tables):
        for source, targets in table.items():
            key, numbers = _key(_split(source, flattened))
            parts = (targets,) if isinstance(targets, str) else targets
            index.setdefault(key, []).append((numbers, tuple(map(_part, parts))))
    return index


def _split(path: str, flattened: bool) -> list[str]:
    """The names in a path. A flattened one may have more than one `_` in a row."""
    return [name for name in re.split("[._]+", path) if name] if flattened else path.split(".")


def _key(names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Names with `{i}` in place of every number, and the numbers."""
    key = tuple("{i}" if name.isdecimal() else name for name in names)
    return key, [name for name, place in zip(names, key, strict=True) if place == "{i}"]


def _part(text: str) -> Part:
    match = _BLOCK.fullmatch(text)
    return Part(match[1], int(match[2]), int(match[3])) if match else Part(text)
