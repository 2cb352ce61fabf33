"""`fluxion diff`: the differences of two adapters or checkpoints."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import click

from adapters.cli.console import make_console, plain, print_json, progress_in_bytes, shape_of, type_of
from adapters.cli.options import Source, as_json

if TYPE_CHECKING:
    from rich.table import Table
    from torch import Tensor

    import weights


_MOST_ROWS = 40  # of a table; --json has all
_AT_ONCE = 1 << 22  # entries
_NUMBER = re.compile(r"(?<![^._])[0-9]{1,9}(?![^._])")  # in the name of a layer


class Incomparable(click.ClickException):
    """Error of a command whose exit code 1 means differences."""

    exit_code = 2


class Comparison(click.Command):
    """Command whose errors have exit code 2."""

    failure = Incomparable


@dataclass(frozen=True)
class Difference:
    """Difference at one layer or tensor.

    Attributes:
        name: The layer or the tensor.
        what: The property that differs.
        a: Its value in A.
        b: Its value in B.
        largest: The largest absolute difference of two entries.
        relative: The norm of the difference relative to that of A.
    """

    name: str
    what: str
    a: str = ""
    b: str = ""
    largest: float | None = None
    relative: float | None = None


@click.command(cls=Comparison)
@click.argument("a", type=Source())
@click.argument("b", type=Source())
@as_json
@click.pass_context
def diff(context: click.Context, a: str, b: str, as_json: bool) -> None:
    """Compare two adapters, or two checkpoints.

    A and B are files, folders, or places on the Hub. Two adapters are compared by their layers, methods,
    hyperparameters and tensors, whatever their formats. Anything else is compared tensor by tensor.

    Exit codes: 0 if they are the same, 1 if they differ, and 2 if they cannot be compared.

    \b
    Example:
      fluxion diff someone/style-lora style.safetensors
    """
    kind, found = _compared(a, b)
    differences = list(found)
    if as_json:
        listed = [asdict(one) for one in differences]
        print_json({"a": a, "b": b, "kind": kind, "same": not differences, "differences": listed})
    else:
        _show(a, b, kind, differences)
    context.exit(1 if differences else 0)


def _compared(a: str, b: str) -> tuple[str, Iterator[Difference]]:
    """The kind of the two sources, adapters or checkpoints, and their differences."""
    import weights

    try:
        return "adapters", _of_adapters(weights.read_adapter(a), weights.read_adapter(b))
    except weights.FileFormatError:
        return "checkpoints", _of_checkpoints(a, b)


# Comparing


def _of_adapters(a: weights.AdapterFile, b: weights.AdapterFile) -> Iterator[Difference]:
    one, other = _layers(a, b), _layers(b, a)
    yield from _only(one, other, lambda layer: layer.method)
    for name in one:
        if name in other:
            yield from _of_layers(name, one[name], other[name])
    for own, given in ((a.shared, b.shared), (a.others, b.others)):
        yield from _of_mappings("", own, given)


def _layers(adapter: weights.AdapterFile, other: weights.AdapterFile) -> dict[str, weights.LayerWeights]:
    """Layers under names that two files share: without dots or component where the other file has none."""
    from adapters.files.resolve.path_index import flat

    if len(adapter.components) == 1 and not other.components:
        adapter = adapter.part(adapter.components[0])
    if not other.flattened or adapter.flattened:
        return dict(adapter.layers)
    places = {name: adapter.component_of(name) for name in adapter.layers}
    return {
        f"{component}.{flat(path)}".removeprefix("."): adapter.layers[name]
        for name, (component, path) in places.items()
    }


def _of_checkpoints(a: str, b: str) -> Iterator[Difference]:
    from adapters.files.checkpoint import Checkpoint

    one, other = Checkpoint.open(a), Checkpoint.open(b)
    kinds, other_kinds = (
        {name: (type_of(info), info.shape) for name, info in some.infos.items()} for some in (one, other)
    )
    sizes = {name: one.infos[name].stop - one.infos[name].start for name in kinds if name in other_kinds}
    done = 0
    with progress_in_bytes("Comparing") as step:

        def read(name: str) -> Tensor:
            nonlocal done
            done += sizes[name]
            step(done, sum(sizes.values()))
            return one.read(name)

        yield from _of_tensors(kinds, other_kinds, read, other.read)


def _of_layers(name: str, a: weights.LayerWeights, b: weights.LayerWeights) -> Iterator[Difference]:
    if a.method != b.method:
        yield Difference(name, "method", a.method, b.method)
        return
    one, other = _numbers(a), _numbers(b)
    for key in dict.fromkeys((*one, *other)):
        if one.get(key) != other.get(key):
            yield Difference(name, key, str(one.get(key)), str(other.get(key)))
    yield from _of_mappings(f"{name} ", a.tensors, b.tensors)


def _numbers(layer: weights.LayerWeights) -> dict[str, Any]:
    """Hyperparameters of a layer, with defaults for those that a format does not store."""
    from adapters.methods import METHODS

    known = fields(METHODS[layer.method]) if layer.method in METHODS else ()
    return {one.name: one.default for one in known if one.default is not MISSING} | dict(layer.hyperparameters)


def _of_mappings(prefix: str, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> Iterator[Difference]:
    kinds, other_kinds = (
        {prefix + name: (type_of(tensor), tuple(tensor.shape)) for name, tensor in some.items()} for some in (a, b)
    )

    def reader(tensors: Mapping[str, Tensor]) -> Callable[[str], Tensor]:
        return lambda name: tensors[name.removeprefix(prefix)]

    return _of_tensors(kinds, other_kinds, reader(a), reader(b))


_Kinds = Mapping[str, tuple[str, tuple[int, ...]]]


def _of_tensors(
    a: _Kinds, b: _Kinds, read_a: Callable[[str], Tensor], read_b: Callable[[str], Tensor]
) -> Iterator[Difference]:
    """Differences of tensors, given their dtypes and shapes; two tensors are in memory at a time."""
    yield from _only(a, b, lambda kind: f"{shape_of(kind[1])} {kind[0]}")
    for name, (dtype, shape) in a.items():
        if name not in b:
            continue
        other_type, other_shape = b[name]
        if shape != other_shape:
            yield Difference(name, "shape", shape_of(shape), shape_of(other_shape))
            continue
        largest, relative = _distance(read_a(name), read_b(name))
        if dtype != other_type:
            yield Difference(name, "type", dtype, other_type, largest, relative)
        elif largest:
            yield Difference(name, "values", "", "", largest, relative)


def _only(a: Mapping[str, Any], b: Mapping[str, Any], told: Callable[[Any], str]) -> Iterator[Difference]:
    """Entries of only one of the two."""
    yield from (Difference(name, "only in A", a=told(a[name])) for name in a if name not in b)
    yield from (Difference(name, "only in B", b=told(b[name])) for name in b if name not in a)


def _distance(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two entries, and norm of the difference relative to that of A.

    NaN equals NaN. Any other difference from NaN or infinity is infinite.
    """
    import torch

    if a.dtype == b.dtype and torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8)):
        return 0.0, 0.0
    largest = squares = length = 0.0
    for one, other in zip(a.flatten().split(_AT_ONCE), b.flatten().split(_AT_ONCE), strict=True):
        # Large integers are not exact in float64.
        whole = one.dtype == other.dtype and one.dtype in (torch.int64, torch.uint64)
        apart = (one != other).double() if whole else torch.zeros((), dtype=torch.float64)
        exact = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
        one, other = one.to(exact), other.to(exact)
        same = (one == other) | (one.isnan() & other.isnan())
        gap = (one - other).abs().masked_fill(same, 0.0).nan_to_num(nan=math.inf, posinf=math.inf).maximum(apart)
        largest = max(largest, float(gap.max())) if gap.numel() else largest
        squares += float(gap.square().sum())
        length += float(one.abs().nan_to_num(nan=0.0, posinf=0.0).square().sum())
    if not squares:
        return largest, 0.0
    return largest, math.sqrt(squares / length) if length and math.isfinite(squares) else math.inf


# Printing


def _show(a: str, b: str, kind: str, differences: list[Difference]) -> None:
    console = make_console()
    if not differences:
        console.print(f"The same: the {kind} {plain(a)} and {plain(b)}.", soft_wrap=True)
        return
    console.print(f"A  {plain(a)}\nB  {plain(b)}", style="bold", soft_wrap=True)
    kinds: dict[str, list[tuple[Difference, int]]] = {}
    rows = _grouped(differences)
    for one, times in rows[:_MOST_ROWS]:
        kinds.setdefault(f"{one.what}: {one.a} → {one.b}" if one.a and one.b else one.what, []).append((one, times))
    for title, some in kinds.items():
        console.print()
        console.print(_table(title, some))
    more = f", of which {_MOST_ROWS} kinds are shown: --json has all" if len(rows) > _MOST_ROWS else ""
    console.print(f"\n{len(differences):,} differences of the {kind}{more}", soft_wrap=True)


def _table(title: str, rows: list[tuple[Difference, int]]) -> Table:
    """Table of the differences of one kind, with the number of each."""
    from rich.table import Table

    measured = any(one.largest is not None for one, _ in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(plain(title), overflow="fold")
    for head in ("largest", "relative") if measured else ("",):
        table.add_column(head, justify="right" if measured else "left", no_wrap=True)
    for one, times in rows:
        name = f"  {plain(one.name) or '(the whole model)'}{f' (×{times})' if times > 1 else ''}"
        only = "" if one.a and one.b else plain(one.a or one.b)
        table.add_row(name, *(f"{number or 0:.3g}" for number in (one.largest, one.relative)) if measured else (only,))
    return table


def _grouped(differences: list[Difference]) -> list[tuple[Difference, int]]:
    """Differences whose names differ in numbers only, as one with their largest measures, and their number."""
    groups: dict[object, list[Difference]] = {}
    for one in differences:
        groups.setdefault((*_NUMBER.split(one.name), one.what, one.a, one.b), []).append(one)
    return [(_together(group), len(group)) for group in groups.values()]


def _together(group: list[Difference]) -> Difference:
    numbers = [
        sorted(set(column), key=int) for column in zip(*(_NUMBER.findall(one.name) for one in group), strict=True)
    ]
    spans = iter("-".join(dict.fromkeys((column[0], column[-1]))) for column in numbers)
    return replace(
        group[0],
        name=_NUMBER.sub(lambda _: next(spans), group[0].name),
        largest=max((one.largest for one in group if one.largest is not None), default=None),
        relative=max((one.relative for one in group if one.relative is not None), default=None),
    )
