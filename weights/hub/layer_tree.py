"""Paths of layers as a small tree of text; paths that differ in numbers only share a line."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from itertools import groupby
from math import prod

_MOST_LINES = 40
_MOST_PARTS = 12  # of a path; more are one
_MOST_LETTERS = 60  # of a part

Tree = dict[str, "Tree"]


def drawn(layers: Mapping[str, str]) -> str:
    """Tree of paths, each with a text: of bounded size, and of printable characters without backticks."""
    tree: Tree = {}
    for parts in _collapsed(layers):
        branch = tree
        for part in parts:
            branch = branch.setdefault(part, {})
    lines = list(_lines(tree, "", top=True))
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES - 1 :] = [f"… and {len(lines) - _MOST_LINES + 1} lines more"]
    return "\n".join(lines)


def natural(name: str) -> tuple[tuple[bool, int | str], ...]:
    """Sort key of names, numbers in them by value."""
    parts = re.split(r"(\d+)", name, flags=re.ASCII)
    return tuple((False, int(part)) if part.isdecimal() and len(part) < 20 else (True, part) for part in parts if part)


def numbers_apart(path: str) -> str:
    """A flattened path with dots around its numbers, so that paths which differ in numbers only are grouped."""
    return re.sub(r"_(\d+)(?=_|$)", r".\1.", path).replace("._", ".").strip(".")


def _collapsed(layers: Mapping[str, str]) -> Iterator[tuple[str, ...]]:
    """The parts of each path, the last with its text; a number may stand for several, such as `0-31`."""
    groups: dict[tuple[tuple[str | None, ...], str], list[list[int]]] = {}
    for path, text in sorted(layers.items()):  # However a file has them, the tree is the same.
        parts = path.split(".", _MOST_PARTS)
        pattern = tuple(None if _is_number(part) else _clean(part) for part in parts)
        groups.setdefault((pattern, text), []).append([int(part) for part in parts if _is_number(part)])
    for (pattern, text), rows in groups.items():
        numbers = [sorted(set(column)) for column in zip(*rows, strict=True)]
        spans = iter(map(_span, numbers))
        *parts, last = [next(spans) if part is None else part for part in pattern]
        count = "" if prod(map(len, numbers)) == len(rows) else f", {len(rows)} layers"
        yield *parts, f"{last if parts or last else 'the whole model'}  {text}{count}"


def _lines(tree: Tree, indent: str, *, top: bool = False) -> Iterator[str]:
    for place, (name, inside) in enumerate(tree.items(), 1):
        while len(inside) == 1:  # A chain of one each is one line.
            ((below, inside),) = inside.items()
            name = f"{name}.{below}"
        last = place == len(tree)
        yield name if top else f"{indent}{'└── ' if last else '├── '}{name}"
        yield from _lines(inside, "" if top else indent + ("    " if last else "│   "))


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdecimal() and len(part) < 7


def _span(numbers: Collection[int]) -> str:
    """`0-3,8` for 0, 1, 2, 3 and 8."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    text = ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return text if len(text) <= _MOST_LETTERS else f"{text[: _MOST_LETTERS - 1]}…"


def _clean(part: str) -> str:
    """A name without what could end a block of code or a line."""
    clean = "".join(letter if letter.isprintable() and letter != "`" else "?" for letter in part[:_MOST_LETTERS])
    return clean if len(part) <= _MOST_LETTERS else f"{clean[:-1]}…"
