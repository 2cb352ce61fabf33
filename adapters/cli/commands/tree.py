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


_MOST_PARTS = 30  # of a name; the rest is one part


@click.command()
@click.argument("source", type=Source())
@click.option("--depth", type=click.IntRange(min=1), metavar="N", help="The number of levels to show.")
@as_json
def tree(source: str, depth: int | None, as_json: bool) -> None:
    """Draw the modules of a checkpoint, without downloading it.

    SOURCE is a safetensors file, a folder with one, with shards or with a pipeline, or a place on the Hub with one of
    these. Only the headers of the files are read. Numbered modules with equal contents are one line.

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
    """Module of a checkpoint: a prefix of tensor names.

    Attributes:
        tensors: Its own tensors.
        inside: Its child modules.
        times: The number of equal modules that it stands for.
    """

    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    inside: dict[str, Module] = field(default_factory=dict)
    times: int = 1

    @classmethod
    def of(cls, infos: Mapping[str, TensorInfo]) -> Module:
        """Module tree of tensors by name, in which equal numbered modules are one."""
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
        """Number of parameters in it, children included."""
        own = sum(math.prod(info.shape) for info in self.tensors.values())
        return own + sum(module.times * module.parameters for module in self.inside.values())

    def collapse(self) -> object:
        """Sort the children and merge equal neighbours. Returns a key that is the same for equal modules."""
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
    """Key that is the same for equal modules with consecutive numbers, and unique otherwise."""
    if not (name.isascii() and name.isdecimal() and len(name) < 20):
        return name
    return int(name) - place, alike[name]


def _rows(module: Module, depth: int | None, usual: str, indent: str | None = None) -> Iterator[tuple[str, str, str]]:
    """Rows of the table for the children of a module.

    Args:
        module: The module to draw.
        depth: The number of levels; None is all.
        usual: The dtype that is not printed.
        indent: The prefix of the tree's lines; None at the top, where there are none.
    """
    if indent is None and module.tensors:
        yield from _lines("(itself)", "", Module(module.tensors), usual)
    for place, (name, below) in enumerate(module.inside.items(), 1):
        while len(below.inside) == 1 and not below.tensors and below.times == 1:  # Only children share a line.
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
    """Rows of one module: name, own tensors (two a row) and number of parameters."""
    from weights.hub.layer_tree import natural

    named = sorted(module.tensors.items(), key=lambda item: (item[0] != "weight", natural(item[0])))
    kinds = {own: "" if type_of(info) == usual else f" {type_of(info)}" for own, info in named}
    told = [f"{own} {shape_of(info.shape)}{kinds[own]}" for own, info in named]
    times = f"{module.times:,} × " if module.times > 1 else ""
    yield name, ", ".join(told[:2]), f"{times}{module.parameters:,}"
    for start in range(2, len(told), 2):
        yield below, ", ".join(told[start : start + 2]), ""
