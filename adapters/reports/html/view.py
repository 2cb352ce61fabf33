"""What pages show, as plain texts, numbers and rows of a tree."""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters.reports.facts import AdapterReport, Facts, Fit, Layer
from weights.hub.layer_tree import numbers_apart

View = dict[str, Any]

_MOST_LAYERS = 3000  # that a page shows; those that change most go first.
_MOST_OPEN = 30  # rows of a tree, at first
_MOST_PARTS = 12  # of a path; more are one
_MOST_LETTERS = 4000  # of a text
_MOST_ENTRIES = 200  # of the metadata
_MOST_REFUSED = 500
STEPS = 9
"""How many colours there are for sizes."""


def clean(text: str, most: int = _MOST_LETTERS) -> str:
    """A text from a file with nothing in it that is not printable, and of bounded length."""
    shown = "".join(letter if letter.isprintable() or letter == "\n" else " " for letter in text[:most])
    return shown if len(text) <= most else f"{shown}… and {len(text) - most:,} letters more"


def number(value: float | None) -> str:
    """`12.9`, with three digits; a dash where there is none."""
    if value is None:
        return "–"
    return _rounded(value)


def share(value: float | None) -> str:
    """`35.2 %`."""
    return "–" if value is None else f"{_rounded(100 * value)} %"


def cosine(value: float | None) -> str:
    """`0.123`."""
    return "–" if value is None else f"{round(value, 3) + 0.0:.3f}"  # No minus where nothing is left.


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if 100 <= abs(value) < 1e6 else f"{value:#.3g}" if value else "0"


# The tree


@dataclass
class Cell:
    """What one adapter does at a row of a tree: nothing where it has no layer there.

    Attributes:
        layers: How many of its layers are there.
        parameters: How many numbers it has for them.
        norms: The squares of the norms of those that could be measured.
        weights: The squares of the norms of their weights.
        note: Why there is no number.
        value: The size that is shown.
        step: The colour for it, from 0.
    """

    layers: int = 0
    parameters: int = 0
    norms: list[float] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    note: str = ""
    value: float | None = None
    step: int | None = None


@dataclass
class Row:
    """A row of a tree.

    Attributes:
        name: The part of the path.
        about: What else is shown of it.
        cells: One for each adapter.
        inside: The rows below, by name.
        is_open: Whether they are shown at first.
    """

    name: str
    cells: list[Cell]
    about: str = ""
    inside: dict[str, Row] = field(default_factory=dict)
    is_open: bool = False

    @property
    def touched(self) -> bool:
        """Whether any adapter has a layer here or below."""
        return any(cell.layers for cell in self.cells)


def _parts(path: str) -> list[str]:
    """The names in a path, of which those with `_` for dots are taken apart at their numbers."""
    shown = clean(path, 400) or "the whole model"
    return (shown if "." in shown.partition("_")[2] or "_" not in shown else numbers_apart(shown)).split(
        ".", _MOST_PARTS
    )


def _tree(report: Facts, layers: Sequence[Mapping[str, Layer]], untouched: Mapping[str, tuple[int, ...]]) -> Row:
    """The rows of a report; of several with one below another there is one."""
    width = len(report.adapters)
    root = Row("", [Cell() for _ in range(width)])
    for place, own in enumerate(layers):
        for layer in own.values():
            rows = [root, *_rows_to(root, layer.path)]
            rows[-1].about = _about(layer)
            for row in rows:
                cell = row.cells[place]
                cell.layers += 1
                cell.parameters += layer.parameters
                cell.norms += [] if layer.norm is None else [layer.norm**2]
                cell.weights += [] if layer.weight_norm is None or layer.norm is None else [layer.weight_norm**2]
            rows[-1].cells[place].note = layer.note
    for path, shape in untouched.items():
        [*_rows_to(root, path)][-1].about = shape_of(shape)
    _merge(root)
    _size(root, relative=report.base is not None)
    _open(root)
    return root


def _rows_to(root: Row, path: str) -> Iterator[Row]:
    for part in _parts(path):
        root = root.inside.setdefault(part, Row(part, [Cell() for _ in root.cells]))
        yield root


def _about(layer: Layer) -> str:
    rank = layer.hyperparameters.get("rank")
    told = [clean(layer.method, 40), f"rank {rank}" if type(rank) is int and rank < 1e9 else ""]
    return " · ".join(filter(None, (*told, shape_of(layer.shape) if layer.shape else "")))


def shape_of(shape: Iterable[int]) -> str:
    """`384 × 1,536`."""
    return " × ".join(f"{size:,}" for size in shape)


def _merge(row: Row) -> None:
    """Make one of rows that have just one below."""
    for name, below in [*row.inside.items()]:
        while len(below.inside) == 1 and not below.about:
            (inner,) = below.inside.values()
            inner.name = f"{below.name}.{inner.name}"
            below = row.inside[name] = inner
        _merge(below)


def _size(row: Row, relative: bool) -> None:
    """Give every row its size: that of all updates below by that of their weights, or the root mean square."""
    for cell in row.cells:
        if cell.norms:
            total = math.fsum(cell.norms)
            size = math.fsum(cell.weights) if relative else len(cell.norms)
            cell.value = math.sqrt(total / size) if size else None
    for below in row.inside.values():
        _size(below, relative)


def _open(root: Row) -> None:
    """Open rows from the top as long as there are not too many."""
    queue, shown = deque([root]), 0
    while queue:
        row = queue.popleft()
        some = [below for below in row.inside.values() if below.touched]
        if shown + len(some) > _MOST_OPEN:
            continue
        row.is_open, shown = True, shown + len(some)
        queue.extend(some)


def _leaves(row: Row) -> Iterator[Row]:
    for below in row.inside.values():
        yield from _leaves(below) if below.inside else [below]


def _paint(row: Row, largest: float) -> None:
    for cell in row.cells:
        if cell.value is not None and math.isfinite(cell.value):
            cell.step = step_of(cell.value, largest)
    for below in row.inside.values():
        _paint(below, largest)


def step_of(value: float, largest: float) -> int:
    """The colour of a size, from 0, by its square root: where one is large, small ones are still told apart."""
    return min(STEPS - 1, int(STEPS * math.sqrt(value / largest))) if largest else 0


# A report


def of_report(report: Facts) -> View:
    """What the templates need of a report."""
    layers, left_out = _shown(report)
    total = sum(len(own) for own in layers)
    untouched = report.untouched if len(report.untouched) + total <= _MOST_LAYERS else {}
    tree = _tree(report, layers, untouched)
    sizes = [cell.value for row in _leaves(tree) for cell in row.cells if cell.value is not None]
    largest = max(sizes, default=0.0)
    _paint(tree, largest)
    relative = report.base is not None
    told = share if relative else number
    return {
        "title": " · ".join(clean(one.name, 80) for one in report.adapters[:4]),
        "base": None if report.base is None else clean(report.base, 200),
        "adapters": [_adapter(one, layers[place]) for place, one in enumerate(report.adapters)],
        "tree": tree,
        "told": told,
        "legend": [told(0.0), told(largest / 4), told(largest)],  # At the ends and in the middle.
        "steps": range(STEPS),
        "measured": bool(sizes),
        "untouched": len(untouched),
        "left_out": left_out,
        "rows": [
            {"adapter": clean(one.name, 80), "path": clean(layer.path, 400), "layer": layer, "about": _about_row(layer)}
            for place, one in enumerate(report.adapters)
            for layer in layers[place].values()
        ],
        "overlaps": [_overlap(one, report) for one in report.overlaps],
        "matrix": _matrix(report),
    }


def _shown(report: Facts) -> tuple[list[dict[str, Layer]], int]:
    """The layers of each adapter by path, and how many are left out because there are too many."""
    everything = [(layer.norm or 0.0, layer.path) for one in report.adapters for layer in one.layers]
    count: Counter[str] = Counter()
    for norm, path in everything:
        count[path] = max(count[path], norm)  # type: ignore[assignment]
    most = max(1, _MOST_LAYERS // max(1, len(report.adapters)))
    kept = {path for path, _ in count.most_common(most)}
    shown = [{layer.path: layer for layer in one.layers if layer.path in kept} for one in report.adapters]
    return shown, len(count) - len(kept)


def _about_row(layer: Layer) -> View:
    rank = layer.hyperparameters.get("rank")
    return {
        "method": clean(layer.method, 40),
        "rank": rank if type(rank) is int and rank < 1e9 else None,
        "shape": shape_of(layer.shape) if layer.shape else "–",
        "cells": layer.shape and math.prod(layer.shape),
        "note": clean(layer.note, 300),
    }


def _adapter(one: AdapterReport, shown: Mapping[str, Layer]) -> View:
    methods = Counter(clean(layer.method, 40) for layer in one.layers)
    ranks = [rank for layer in one.layers if type(rank := layer.hyperparameters.get("rank")) is int and rank < 1e9]
    measured = [layer for layer in one.layers if layer.norm is not None]
    changed = math.fsum((layer.norm or 0.0) ** 2 for layer in measured)
    of = math.fsum(layer.weight_norm**2 for layer in measured if layer.weight_norm is not None)
    effective = [layer.effective_rank for layer in measured if layer.effective_rank is not None]
    unmeasured = Counter(clean(layer.note, 300) for layer in one.layers if layer.note)
    return {
        "name": clean(one.name, 80),
        "source": clean(one.source, 300),
        "format": one.format or "–",
        "base_model": clean(one.base_model or "–", 200),
        "task": clean(one.task or "–", 80),
        "layers": len(one.layers),
        "parameters": one.parameters,
        "size": _bytes(one.bytes),
        "types": ", ".join(one.dtypes),
        "methods": ", ".join(methods),
        "ranks": "–" if not ranks else f"{min(ranks)}" if min(ranks) == max(ranks) else f"{min(ranks)} to {max(ranks)}",
        "norm": math.sqrt(changed) if measured else None,
        "relative": math.sqrt(changed / of) if of else None,
        "effective": math.fsum(effective) / len(effective) if effective else None,
        "unmeasured": unmeasured.most_common(5),
        "metadata": [*_metadata(one.metadata)],
        "metadata_left_out": max(0, len(one.metadata) - _MOST_ENTRIES),
        "fit": None if one.fit is None else _fit(one.fit),
    }


def _fit(fit: Fit) -> View:
    return {
        "loads": len(fit.loads),
        "refused": [clean(sentence, 500) for sentence in fit.refused[:_MOST_REFUSED]],
        "refused_count": len(fit.refused),
        "unchecked": [clean(path, 400) or "the whole model" for path in fit.unchecked[:_MOST_REFUSED]],
    }


def _bytes(count: int) -> str:
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:,.1f} {unit}"
    return f"{count} bytes"


def _metadata(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for name, text in sorted(metadata.items())[:_MOST_ENTRIES]:
        try:
            told = json.dumps(json.loads(text), indent=1, ensure_ascii=False) if text[:1] in "[{" else text
        except (ValueError, RecursionError):
            told = text
        yield clean(name, 200), clean(told)


def _overlap(one: Any, report: Facts) -> View:
    return {
        "a": clean(one.a, 80),
        "b": clean(one.b, 80),
        "cosine": one.cosine,
        "layers": [
            {"path": clean(layer.path, 400), "cosine": layer.cosine, "subspace": layer.subspace, "chance": layer.chance}
            for layer in one.layers[:_MOST_LAYERS]
        ],
    }


def _matrix(report: Facts) -> list[list[float | None]]:
    """The cosine of each adapter with each."""
    places = {one.name: place for place, one in enumerate(report.adapters)}
    matrix: list[list[float | None]] = [
        [1.0 if row == column else None for column in range(len(places))] for row in range(len(places))
    ]
    for one in report.overlaps:
        a, b = places[one.a], places[one.b]
        matrix[a][b] = matrix[b][a] = one.cosine
    return matrix


# The charts


def charts_of(report: Facts) -> View:
    """What the charts are drawn of, as JSON has it."""
    layers, _ = _shown(report)
    paths = {path: number for number, path in enumerate(dict.fromkeys(path for own in layers for path in own))}
    blocks: dict[str, int] = {}
    kinds: dict[str, int] = {}
    grid = []
    for path in paths:
        block, kind = _block(path)
        grid.append([blocks.setdefault(block, len(blocks)), kinds.setdefault(kind, len(kinds))])
    return {
        "adapters": [clean(one.name, 80) for one in report.adapters],
        "relative": report.base is not None,
        "paths": [clean(path, 400) or "the whole model" for path in paths],
        "grid": grid,
        "blocks": [*blocks],
        "kinds": [*kinds],
        "sizes": [[_short(_size_of(own.get(path), report)) for path in paths] for own in layers],
        "ranks": [[_short(own[path].effective_rank if path in own else None) for path in paths] for own in layers],
        "spectra": [
            [[_short(value) for value in own[path].singular_values] if path in own else [] for path in paths]
            for own in layers
        ],
        "overlaps": [
            {
                "a": clean(one.a, 80),
                "b": clean(one.b, 80),
                "layers": {
                    str(paths[layer.path]): [_short(layer.cosine), _short(layer.subspace), _short(layer.chance)]
                    for layer in one.layers
                    if layer.path in paths
                },
            }
            for one in report.overlaps
        ],
    }


def _size_of(layer: Layer | None, report: Facts) -> float | None:
    if layer is None:
        return None
    return layer.norm if report.base is None else layer.relative


def _short(value: float | None) -> float | None:
    """A number with four digits, which are enough to draw it."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _block(path: str) -> tuple[str, str]:
    """The block that a layer is in, which ends with a number, and its name in there."""
    parts = _parts(path)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place].isdecimal():
            return ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])
    return "", ".".join(parts)
