"""Output of extract, resize and combine: rank and relative error of each layer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from adapters.cli.console import columns, make_console, plain, print_json

if TYPE_CHECKING:
    from adapters.files.reduction import Reduction


def show(made: Reduction, as_json: bool, **more: Any) -> None:
    """Print ranks, errors and left-out tensors, as a table or as JSON."""
    layers = [{"path": path, "rank": rank, "error": made.errors[path]} for path, rank in made.ranks.items()]
    if as_json:
        said = {"destination": str(made.path), "format": made.format, **more, "layers": layers}
        print_json({**said, "left_out": made.left_out})
        return
    console = make_console()
    table = columns("layer", "rank", "error", right=("rank", "error"), cut=("layer",))
    for path, rank in made.ranks.items():
        table.add_row(plain(path), str(rank), f"{100 * made.errors[path]:.2f} %")
    console.print(table)
    if made.left_out:
        left = columns("left out", "tensors", "such as", right=("tensors",), cut=("such as",))
        for reason in dict.fromkeys(made.left_out.values()):
            names = [name for name, why in made.left_out.items() if why == reason]
            left.add_row(reason, f"{len(names):,}", plain(", ".join(names[:3])))
        console.print(left)
    off = math.sqrt(sum(error**2 for error in made.errors.values()) / len(made.errors))
    least, most = min(made.ranks.values()), max(made.ranks.values())
    console.print(
        f"{made.path}: {len(layers):,} {'layer' if len(layers) == 1 else 'layers'} in {made.format} format, of rank"
        f" {least if least == most else f'{least} to {most}'}, relative error {100 * off:.2f} % (root mean square)."
    )
