"""Output of commands: on terminals of any width, as plain text in a file or a pipe, and as JSON."""

from __future__ import annotations

import io
import json
import math
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn
    from rich.table import Table
    from torch import Tensor

    from weights.disk.header import TensorInfo


_LONGEST = 500  # characters


def replace_what_cannot_be_encoded() -> None:
    """Replace characters that stdout cannot encode, instead of failing. File names keep undecodable bytes."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape" if sys.stdout.encoding.lower() == "utf-8" else "replace")


def make_console() -> Console:
    """Console that neither wraps nor cuts lines where there is no terminal."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, width=None if sys.stdout.isatty() else 200)


def print_json(document: Mapping[str, Any]) -> None:
    """Print a JSON document. JSON has no infinity and no NaN: these become strings."""
    click.echo(json.dumps(_finite(document), indent=2, allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inside) for name, inside in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inside) for inside in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def progress_in_bytes(text: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Progress bar on stderr, on terminals only, with rate and time left; yields a function of bytes done and total."""
    from rich.progress import DownloadColumn, TransferSpeedColumn

    return _progress(text, DownloadColumn(), TransferSpeedColumn())


def progress_in_layers(text: str) -> AbstractContextManager[Callable[[int, int], None]]:
    """Progress bar like `progress_in_bytes`; yields a function of layers done and total."""
    from rich.progress import MofNCompleteColumn, ProgressColumn, Task, TextColumn
    from rich.text import Text

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text("" if task.speed is None else f"{task.speed:,.1f}/s")

    return _progress(text, MofNCompleteColumn(), TextColumn("layers"), Rate())


@contextmanager
def _progress(text: str, *amounts: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True, markup=False)
    shown = (TextColumn("{task.description}"), BarColumn(), *amounts, TimeRemainingColumn())
    with Progress(*shown, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def facts(console: Console, rows: Mapping[str, str]) -> None:
    """Print names and values in two columns; empty values are left out."""
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for name, text in rows.items():
        if text:
            grid.add_row(name, short(text))
    console.print(grid)


def columns(*names: str, right: Collection[str] = (), cut: Collection[str] = ()) -> Table:
    """Table without rows.

    Args:
        names: The headers of the columns.
        right: Columns that are aligned to the right.
        cut: Columns that are truncated where the terminal is narrow; others wrap.
    """
    from rich import box
    from rich.table import Table

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
    """Text from an untrusted file, without control characters."""
    return "".join(character if character.isprintable() else " " for character in text)


def short(text: str) -> str:
    """Beginning of a text from an untrusted file, without control characters."""
    return plain(text[:_LONGEST])


def megabytes(count: int) -> str:
    """Size such as `90.9 MB`."""
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:,.1f} {unit}"
    return f"{count} bytes"


def type_of(tensor: Tensor | TensorInfo) -> str:
    """Name of a dtype, such as `float32`."""
    return str(tensor.dtype).removeprefix("torch.")


def types(count: Mapping[str, int]) -> str:
    """The one dtype, or each of several with its number of parameters."""
    return ", ".join(f"{number:,} {name}" if len(count) > 1 else name for name, number in count.items())


def shape_of(shape: Iterable[int]) -> str:
    """Shape such as `384×384`; that of a scalar is `1`."""
    return "×".join(map(str, shape)) or "1"
