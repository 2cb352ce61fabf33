"""The tree of layers in a report, with a row for each part of a path."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from adapters.reports.facts import Facts, Layer
from adapters.reports.html.shown import clean, parts_of, shape_of

_MOST_OPEN = 30  # rows at first
STEPS = 9
"""The number of colours for sizes."""


@dataclass
class Cell:
    """The update of one adapter at a row of a tree: empty where it has no layer there.

    Attributes:
        layers: The number of its layers there.
        parameters: The number of their parameters.
        norms: The squared norms of those that could be measured.
        weights: The squared norms of their weights.
        note: The reason why there is no number.
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
        cells: One for each adapter.
        about: The method, the rank and the shape.
        inside: The rows below, by name.
        is_open: Whether these are shown at first.
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


def tree_of(report: Facts, layers: Sequence[Mapping[str, Layer]], untouched: Mapping[str, tuple[int, ...]]) -> Row:
    """The rows of a report. A row with a single row below it is joined with that."""
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
    for part in parts_of(path):
        root = root.inside.setdefault(part, Row(part, [Cell() for _ in root.cells]))
        yield root


def _about(layer: Layer) -> str:
    rank = layer.hyperparameters.get("rank")
    told = [clean(layer.method, 40), f"rank {rank}" if type(rank) is int and rank < 1e9 else ""]
    return " · ".join(filter(None, (*told, shape_of(layer.shape) if layer.shape else "")))


def _merge(row: Row) -> None:
    """Join every row that has a single row below it with that."""
    for name, below in [*row.inside.items()]:
        while len(below.inside) == 1 and not below.about:
            (inner,) = below.inside.values()
            inner.name = f"{below.name}.{inner.name}"
            below = row.inside[name] = inner
        _merge(below)


def _size(row: Row, relative: bool) -> None:
    """Set the size of every row: the norm of all updates below by that of their weights, or the root mean square."""
    for cell in row.cells:
        if cell.norms:
            total = math.fsum(cell.norms)
            size = math.fsum(cell.weights) if relative else len(cell.norms)
            cell.value = math.sqrt(total / size) if size else None
    for below in row.inside.values():
        _size(below, relative)


def _open(root: Row) -> None:
    """Open rows from the top until enough are shown."""
    queue, shown = deque([root]), 0
    while queue:
        row = queue.popleft()
        some = [below for below in row.inside.values() if below.touched]
        if shown + len(some) > _MOST_OPEN:
            continue
        row.is_open, shown = True, shown + len(some)
        queue.extend(some)


def leaves(row: Row) -> Iterator[Row]:
    for below in row.inside.values():
        yield from leaves(below) if below.inside else [below]


def paint(row: Row, largest: float) -> None:
    for cell in row.cells:
        if cell.value is not None and math.isfinite(cell.value):
            cell.step = step_of(cell.value, largest)
    for below in row.inside.values():
        paint(below, largest)


def step_of(value: float, largest: float) -> int:
    """The colour of a size, from 0, by its square root, so that small sizes differ where one is large."""
    return min(STEPS - 1, int(STEPS * math.sqrt(value / largest))) if largest else 0
