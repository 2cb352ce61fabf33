"""The location of an error: its path in the tree, the inputs there, and the modules around it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import islice
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from fluxion.printing.tree import label

_AROUND = 3  # Siblings shown on each side of the failing child, and ancestors shown above it.


class Located(Protocol):
    """A module that knows its path and its ancestors: all that is needed of a chain here."""

    _modules: dict[str, nn.Module]

    def get_path(self) -> str: ...
    def get_parents(self) -> Sequence[nn.Module]: ...


def locate(error: Exception, chain: Located, key: str, args: tuple[Any, ...]) -> None:
    """Add a note to an error with the path of the child that raised it and its inputs, unless it has one already.

    The error object stays: it is caught by its own type, and keeps its message.
    """
    if getattr(error, "_fluxion_location", None) is None:
        error._fluxion_location = f"{chain.get_path()}.{key}"  # type: ignore[attr-defined]
        # Calls made next to compiled code are traced as well, which this code is not made for.
        describe = torch.compiler.disable(_describe) if "torch._dynamo" in sys.modules else _describe
        error.add_note(describe(chain, key, args))


def _describe(chain: Located, key: str, args: tuple[Any, ...]) -> str:
    return f"{chain.get_path()}.{key} failed on {summarize(args)}\n{_surroundings(chain, key)}"


def summarize(value: object) -> str:
    """Short text of a value: tensors by shape, dtype and device."""
    if isinstance(value, Tensor):
        shape = ", ".join(map(str, value.shape))
        return f"Tensor(shape=({shape}), dtype={str(value.dtype).removeprefix('torch.')}, device={value.device})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(summarize, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {summarize(item)}' for key, item in value.items())}}}"
    try:
        text = repr(value)
    except Exception:  # It must not hide the error being located.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _surroundings(chain: Located, key: str) -> str:
    """Tree of the failing child, marked `>>>`, its nearest siblings and its nearest ancestors."""
    ancestors = [cast(nn.Module, chain), *islice(chain.get_parents(), _AROUND)]
    indent = ""
    lines = []
    for node in reversed(ancestors):
        lines.append(f"    {indent}{'└── ' if indent else ''}{label(node)}")
        indent += "    "
    siblings = list(chain._modules.items())
    here = next((place for place, (name, _) in enumerate(siblings) if name == key), 0)
    first, last = max(0, here - _AROUND), min(len(siblings), here + _AROUND + 1)
    if first > 0:
        lines.append(f"    {indent}├── ...")
    for place in range(first, last):
        name, child = siblings[place]
        branch = "└── " if place == len(siblings) - 1 else "├── "
        lines.append(f"{'>>> ' if name == key else '    '}{indent}{branch}{label(child)}")
    if last < len(siblings):
        lines.append(f"    {indent}└── ...")
    return "\n".join(lines)
