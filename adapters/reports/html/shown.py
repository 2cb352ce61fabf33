"""Strings and numbers as pages show them, and the layers that a page shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from adapters.reports.facts import Facts, Layer
from weights.hub.layer_tree import numbers_apart

_MOST_LETTERS = 4000  # of a string
_MOST_PARTS = 12  # of a path; more are one
MOST_LAYERS = 3000
"""The layers that a page shows at most; those that change most go first."""


def clean(text: str, most: int = _MOST_LETTERS) -> str:
    """A string from a file without characters that are not printable, and of bounded length."""
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


def shape_of(shape: Iterable[int]) -> str:
    """`384 × 1,536`."""
    return " × ".join(f"{size:,}" for size in shape)


def parts_of(path: str) -> list[str]:
    """The names in a path. One with `_` for dots is split at its numbers."""
    shown = clean(path, 400) or "the whole model"
    return (shown if "." in shown.partition("_")[2] or "_" not in shown else numbers_apart(shown)).split(
        ".", _MOST_PARTS
    )


def shown_layers(report: Facts) -> tuple[list[dict[str, Layer]], int]:
    """The layers of each adapter by path, and the number of those left out because there are too many."""
    everything = [(layer.norm or 0.0, layer.path) for one in report.adapters for layer in one.layers]
    count: Counter[str] = Counter()
    for norm, path in everything:
        count[path] = max(count[path], norm)  # type: ignore[assignment]
    most = max(1, MOST_LAYERS // max(1, len(report.adapters)))
    kept = {path for path, _ in count.most_common(most)}
    shown = [{layer.path: layer for layer in one.layers if layer.path in kept} for one in report.adapters]
    return shown, len(count) - len(kept)
