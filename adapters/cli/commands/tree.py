"""`fluxion tree`: the modules of a checkpoint, without reading its tensors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import click

from adapters.cli.console import columns, make_console, megabytes, plain, print_json, shape_of, type_of, types
from adapters.cli.options import Source, as_json

if TYPE_CHECKING:
    from weights.disk.header import TensorInfo


_MOST_PARTS = 30  # of a name; more are one


@click.command()
@click.argument("source", type=Source())
@click.option("--depth", type=click.IntRange(min=1), metavar="N", help="Show modules inside modules so far only.")
@as_json
def tree(source: str, depth: int | None, as_json: bool) -> None:
    """Draw the modules of a checkpoint, without downloading it.

    SOURCE is a safetensors file, a folder with one, with shards or with a pipeline, or a place on the Hub with one of
    these. Only the headers of the files are read. Modules that are alike and numbered are one line.

    \b
    Example:
      fluxion tree someone/model --depth 2
    """
    from adapters.files.checkpoint import Checkpoint

    infos = Checkpoint.open(source).infos
    size = sum(info.stop - info.start for info in infos.values())
    counter: Counter[str] = Counter()
    for info in infos.values():
        counter[type_of(info)] += math.prod(info.shape)
    kinds, count = dict(counter.most_common()), counter.total()
    if as_json:
        tensors = {name: {"dtype": type_of(info), "shape": list(info.shape)} for name, info in infos.items()}
        print_json({"source": source, "parameters": count, "bytes": size, "dtypes": kinds, "tensors": tensors})
        return
    console = make_console()
    console.print(plain(source), style="bold", soft_wrap=True)
    console.print(f"{len(infos):,} tensors, {count:,} parameters ({types(kinds)}), {megabytes(size)}\n")
    table = columns("module", "tensors", "parameters", right=("parameters",), cut=("module", "tensors"))
    for row in _rows(Module.of(infos), depth, usual=next(iter(kinds), "")):
        table.add_row(*row)
    console.print(table)


@dataclass
class Module:
    """A module of a checkpoint: what the names of tensors begin with.

    Attributes:
        tensors: Its own tensors.
        inside: The modules in it.
        times: How many there are that are alike.
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    inside: dict[str, Module] = field(default_factory=dict)
    times: int = 1

    @classmethod
    def of(cls, infos: Mapping[str, TensorInfo]) -> Module:
        """The modules of some tensors, where those that are numbered and alike are one."""
        root = cls()
        for name, info in infos.items():
            *parts, last = name.split(".", _MOST_PARTS)
            module = root
            for part in parts:
                module = module.inside.setdefault(part, cls())
            module.tensors[last] = info
        root.collapse()
        return root

    @property
    def parameters(self) -> int:
        """How many there are in it."""
        own = sum(math.prod(info.shape) for info in self.tensors.values())
        return own + sum(module.times * module.parameters for module in self.inside.values())

    def collapse(self) -> object:
        """Put in order what is inside, and make one of neighbours that are alike. Equal for modules that are alike."""
        from weights.hub.layer_tree import natural

        alike = {name: module.collapse() for name, module in self.inside.items()}
        names = sorted(self.inside, key=natural)
        found: dict[str, Module] = {}
        for _, group in groupby(enumerate(names), lambda item: _run(item[1], item[0], alike)):
            run = [name for _, name in group]
            module = found[run[0] if len(run) == 1 else f"{run[0]}-{run[-1]}"] = self.inside[run[0]]
            module.times = len(run)
        self.inside = found
        tensors = ((name, type_of(info), info.shape) for name, info in sorted(self.tensors.items()))
        return tuple(tensors), tuple((name, alike[name]) for name in names)


def _run(name: str, place: int, alike: Mapping[str, object]) -> object:
    """Equal for neighbours that are alike and whose numbers follow each other; otherwise for none."""
    if not (name.isascii() and name.isdecimal() and len(name) < 20):
        return name
    return int(name) - place, alike[name]


def _rows(module: Module, depth: int | None, usual: str, indent: str | None = None) -> Iterator[tuple[str, str, str]]:
    """The lines of a table for what is in a module.

    Args:
        module: What is to be drawn.
        depth: How many levels of it; None is all.
        usual: The type that is not told.
        indent: What is before the branches; None where there are none, at the top.
    """
    if indent is None and module.tensors:
        yield from _lines("(itself)", "", Module(module.tensors), usual)
    for place, (name, below) in enumerate(module.inside.items(), 1):
        while len(below.inside) == 1 and not below.tensors and below.times == 1:  # A chain of one each is one line.
            ((inner, below),) = below.inside.items()
            name = f"{name}.{inner}"
        last = place == len(module.inside)
        branch = "" if indent is None else f"{indent}{'└── ' if last else '├── '}"
        deeper = "" if indent is None else f"{indent}{'    ' if last else '│   '}"
        inside = depth is None or depth > 1
        yield from _lines(f"{branch}{name}", deeper + "│" * (inside and bool(below.inside)), below, usual)
        if inside:
            yield from _rows(below, depth and depth - 1, usual, deeper)


def _lines(name: str, below: str, module: Module, usual: str) -> Iterator[tuple[str, str, str]]:
    """The lines of a module: its name, two of its own tensors in each, and how many parameters it has."""
    from weights.hub.layer_tree import natural

    named = sorted(module.tensors.items(), key=lambda item: (item[0] != "weight", natural(item[0])))
    kinds = {own: "" if type_of(info) == usual else f" {type_of(info)}" for own, info in named}
    told = [f"{own} {shape_of(info.shape)}{kinds[own]}" for own, info in named]
    times = f"{module.times:,} × " if module.times > 1 else ""
    yield name, ", ".join(told[:2]), f"{times}{module.parameters:,}"
    for start in range(2, len(told), 2):
        yield below, ", ".join(told[start : start + 2]), ""
