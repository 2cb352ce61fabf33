"""Plot of a table: the ratios of each row, and their targets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

COLOURS = ("#0b6e99", "#d9730d", "#6940a5", "#8a8f98", "#0f7b6c", "#ad1a72", "#dfab01")
INK, GRID = "#33373d", "#e4e6e9"


def plot(rows: Sequence[Mapping[str, Any]], path: Path) -> bool:
    """Draw the ratios of a table, with quartiles, and a tick of the same colour for each target.

    Args:
        rows: As of `report`: ratios are what has a median, and the first column that is text says what a row is.
        path: Where the picture goes.

    Returns:
        Whether there are any ratios.
    """
    columns = list(dict.fromkeys(name for row in rows for name, value in row.items() if hasattr(value, "median")))
    shown = [row for row in rows if any(hasattr(value, "median") for value in row.values())]
    if not shown:
        return False
    colours = dict(zip(columns, COLOURS * len(columns), strict=False))
    labels = [", ".join(value for key, value in row.items() if isinstance(value, str)) for row in shown]
    lanes = [[column for column in columns if row.get(column) is not None] for row in shown]
    height = 0.9 + 0.13 * len(shown) * (1.4 + 0.75 * max(map(len, lanes)))
    figure = Figure(figsize=(9, height), layout="constrained")
    axes = figure.subplots()
    for number, row in enumerate(shown):
        for place, column in enumerate(lanes[number]):
            y, value = number + 0.72 * ((place + 0.5) / len(lanes[number]) - 0.5), row[column]
            axes.hlines(y, value.low, value.high, colours[column], linewidth=3, alpha=0.35)
            axes.plot(value.median, y, "o", color=colours[column], markersize=5)
            if (limit := (row.get("target") or {}).get(column)) is not None:
                axes.plot(limit, y, "|", color=colours[column], markersize=13, markeredgewidth=2)
    axes.axvline(1, color=INK, linewidth=0.8, zorder=0)
    if all(row[column].median > 0 for row, present in zip(shown, lanes, strict=True) for column in present):
        axes.set_xscale("log")
        if axes.get_xlim()[1] / axes.get_xlim()[0] < 30:
            axes.xaxis.set_minor_formatter("{x:g}")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(shown)), labels)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.grid(axis="x", which="both", color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelsize=8, colors=INK)
    axes.spines[:].set_visible(False)
    for line in range(1, len(shown)):
        axes.axhline(line - 0.5, color=GRID, linewidth=0.8, zorder=0)
    keys = [Line2D([], [], marker="o", linestyle="", color=colours[column], label=column) for column in columns]
    keys.append(Line2D([], [], marker="|", linestyle="", color=INK, markersize=11, markeredgewidth=2, label="target"))
    figure.legend(handles=keys, loc="outside upper left", ncols=min(len(keys), 5), frameon=False, fontsize=8)
    with matplotlib.rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
    return True
