"""The data of the charts in a report."""

from __future__ import annotations

import math
from typing import Any

from adapters.reports.facts import Facts, Layer
from adapters.reports.html.shown import clean, parts_of, shown_layers


def charts_of(report: Facts) -> dict[str, Any]:
    """The data of the charts, for JSON."""
    layers, _ = shown_layers(report)
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
    parts = parts_of(path)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place].isdecimal():
            return ".".join(parts[: place + 1]), ".".join(parts[place + 1 :])
    return "", ".".join(parts)
