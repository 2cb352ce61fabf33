"""The values of the templates: plain strings, numbers and rows of a tree."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from adapters.reports.facts import AdapterReport, Facts, Fit, Layer
from adapters.reports.html.shown import MOST_LAYERS, clean, number, shape_of, share, shown_layers
from adapters.reports.html.tree import STEPS, leaves, paint, tree_of

View = dict[str, Any]

_MOST_ENTRIES = 200  # of the metadata
_MOST_REFUSED = 500


def of_report(report: Facts) -> View:
    """The values of the templates for a report."""
    layers, left_out = shown_layers(report)
    total = sum(len(own) for own in layers)
    untouched = report.untouched if len(report.untouched) + total <= MOST_LAYERS else {}
    tree = tree_of(report, layers, untouched)
    sizes = [cell.value for row in leaves(tree) for cell in row.cells if cell.value is not None]
    largest = max(sizes, default=0.0)
    paint(tree, largest)
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
            for layer in one.layers[:MOST_LAYERS]
        ],
    }


def _matrix(report: Facts) -> list[list[float | None]]:
    """The cosine of every pair of adapters."""
    places = {one.name: place for place, one in enumerate(report.adapters)}
    matrix: list[list[float | None]] = [
        [1.0 if row == column else None for column in range(len(places))] for row in range(len(places))
    ]
    for one in report.overlaps:
        a, b = places[one.a], places[one.b]
        matrix[a][b] = matrix[b][a] = one.cosine
    return matrix
