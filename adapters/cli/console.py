"""What commands print, on terminals of any width, as plain text in a file or a pipe, and as JSON."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import click
from rich import box
from rich.console import Console
from rich.table import Table

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")


def make_console() -> Console:
    """A console that neither wraps nor cuts lines where there is no terminal, and replaces what it cannot encode."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 200)


def print_json(document: Mapping[str, Any]) -> None:
    """Print a document for other programs."""
    click.echo(json.dumps(document, indent=2, allow_nan=False, default=str))


def facts(console: Console, rows: Mapping[str, str]) -> None:
    """Names and what is said of them, in two columns; what is empty is left out."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows.items():
        if text:
            grid.add_row(name, plain(text))
    console.print(grid)


def columns(*names: str, right: Collection[str] = (), cut: Collection[str] = ()) -> Table:
    """A table without rows.

    Args:
        names: The heads of its columns.
        right: Those of which the rows stand at the right.
        cut: Those that are cut at the edge where the terminal is narrow; others go on in the next line.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in names:
        table.add_column(
            name,
            justify="right" if name in right else "left",
            no_wrap=name in cut or name in right,
            overflow="ellipsis" if name in cut else "fold",
        )
    return table


def plain(text: str) -> str:
    """A text from a file, where anything may be, with nothing in it that a terminal would obey."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def megabytes(count: int) -> str:
    """`90.9 MB`."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:,.1f} {unit}"
    return f"{count} bytes"


def shape_of(shape: Iterable[int]) -> str:
    """`384×384`; a number by itself is `1`."""
    return "×".join(map(str, shape)) or "1"
