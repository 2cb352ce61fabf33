"""Output of the demo: on terminals of any width, and as plain text in a file or a pipe."""

from __future__ import annotations

from collections.abc import Mapping

import click
from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.status import Status
from rich.table import Table
from rich.text import Text
from torch import Tensor

from adapters.cli.demo import steps
from adapters.cli.demo.data import DOMAINS

_MARGIN = "   "
_BLOCKS = " ▄▀█"  # Two pixels, one above the other: none, the lower one, the upper one, both.


def heading(console: Console, title: str) -> None:
    """Print the title of a step."""
    console.print()
    console.print(title, style="bold")


def lines(console: Console, *texts: str, style: str = "") -> None:
    """Print lines below a title."""
    for text in texts:
        console.print(_MARGIN + text, style=style, soft_wrap=True)


def code(console: Console, *texts: str) -> None:
    """Print the calls of a step."""
    lines(console, *texts, style="cyan")


def tree(console: Console, picture: str) -> None:
    """Print a Chain, with the branches of patches in colour. Lines are truncated: wrapped, they would be no tree."""
    for text in picture.splitlines():
        style = "magenta" if "(LORA)" in text else ""
        console.print(_MARGIN + text, style=style, no_wrap=True, overflow="ellipsis")


def digits(console: Console, images: Mapping[str, Tensor]) -> None:
    """Print images (8, 8) in 0..1 side by side, under their names."""
    lines(console, "".join(f"{name:<14}" for name in images).rstrip(), style="dim")
    for rows in zip(*map(_blocks, images.values()), strict=True):
        lines(console, "".join(f"{row:<14}" for row in rows).rstrip())


def _blocks(image: Tensor) -> list[str]:
    ink = (image > 0.45).int()  # Less is a stroke's edge.
    return ["".join(_BLOCKS[pixel] for pixel in row) for row in (2 * ink[::2] + ink[1::2]).tolist()]


def training(console: Console) -> Progress:
    """Progress bars for training, with the loss."""
    return Progress(
        TextColumn("   {task.description:<9}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        console=console,
    )


def waiting(console: Console, text: str) -> Status:
    """Spinner, on terminals, for work of unknown duration."""
    return console.status(Text(text))


def accuracies(console: Console, table: steps.Table) -> None:
    """Print a row for each set of active patches, a column for each domain."""
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    grid.add_column("active patches")
    for domain in DOMAINS:
        grid.add_column(f"{domain} digits", justify="right")
    for choice, row in table.items():
        grid.add_row(choice, *(Text(percent(value), style=_style(choice, domain)) for domain, value in row.items()))
    console.print(Padding(grid, (0, 0, 0, len(_MARGIN)), expand=False))


def _style(choice: str, domain: str) -> str:
    """Green for a patch on its own domain, red for the base on a new one, dim otherwise."""
    if choice == domain or (choice, domain) == ("base", "upright"):
        return "bold green"
    return "red" if choice == "base" else "dim"


def checks(console: Console, statements: Mapping[str, bool]) -> None:
    """Print statements, each with a mark for true or false.

    Raises:
        click.ClickException: One is false.
    """
    for statement, true in statements.items():
        mark = ("✓", "green") if true else ("✗", "bold red")
        console.print(Text.assemble(_MARGIN, mark, f" {statement}"))
    if false := [statement for statement, true in statements.items() if not true]:
        raise click.ClickException(f"This should be true and is not: {'; '.join(false)}.")


def summary(console: Console, text: str) -> None:
    """Print the last line."""
    console.print()
    console.print(text, style="bold green")


def percent(share: float, decimals: int = 1) -> str:
    """Percentage such as `92.7 %`."""
    return f"{100 * share:.{decimals}f} %"
