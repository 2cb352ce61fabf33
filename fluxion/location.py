"""Where in the tree an error happened."""

from __future__ import annotations

import sys
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fluxion.tree import label

if TYPE_CHECKING:
    from fluxion.chain import Chain

_AROUND = 3  # Siblings shown on each side of the failing child, and ancestors shown above it.


def locate(error: Exception, chain: Chain, key: str, args: tuple[Any, ...]) -> None:
    """Add to an error the place in the tree where it was raised and the inputs there, unless it has one already.

    The error stays the same object: it can be caught by its own type and keeps its own message.
    """
    if getattr(error, "_fluxion_location", None) is None:
        error._fluxion_location = f"{chain.get_path()}.{key}"  # type: ignore[attr-defined]
        # What is run beside compiled code is traced as well, but this is not made for it.
        describe = torch.compiler.disable(_describe) if "torch._dynamo" in sys.modules else _describe
        error.add_note(describe(chain, key, args))


def _describe(chain: Chain, key: str, args: tuple[Any, ...]) -> str:
    return f"{chain.get_path()}.{key} failed on {summarize(args)}\n{_surroundings(chain, key)}"


def summarize(value: object) -> str:
    """A value in a few words: tensors by shape, dtype and device."""
    if isinstance(value, Tensor):
        shape = ", ".join(map(str, value.shape))
        return f"Tensor(shape=({shape}), dtype={str(value.dtype).removeprefix('torch.')}, device={value.device})"
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(summarize, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {summarize(item)}' for key, item in value.items())}}}"
    try:
        text = repr(value)
    except Exception:  # It must not hide the error that is being described.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _surroundings(chain: Chain, key: str) -> str:
    """The failing child, marked, between its siblings, under the nearest of its ancestors."""
    ancestors: list[nn.Module] = [chain, *islice(chain.get_parents(), _AROUND)]
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
