"""`fluxion inspect`: format, methods and layers of an adapter file."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import TYPE_CHECKING, Any

import click

from adapters.cli.console import (
    columns,
    facts,
    make_console,
    megabytes,
    plain,
    print_json,
    shape_of,
    short,
    type_of,
    types,
)
from adapters.cli.options import Source, as_json

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    import weights


_MOST_VALUES = 3  # of a hyperparameter that is not a number
_MOST_TAGS = 8
_TAGS = "ss_tag_frequency"  # The number of images with each tag, by folder, in kohya's files.


@click.command()
@click.argument("source", type=Source())
@as_json
def inspect(source: str, as_json: bool) -> None:
    """Print the format, methods and layers of an adapter.

    SOURCE is a file, a folder, or a place on the Hub such as user/repo, user/repo@revision or user/repo:folder/file.

    \b
    Example:
      fluxion inspect style.safetensors
    """
    import weights

    adapter = weights.read_adapter(source)
    if as_json:
        print_json(_document(source, adapter))
    else:
        _show(make_console(), source, adapter)


def _document(source: str, adapter: weights.AdapterFile) -> dict[str, Any]:
    return {
        "source": source,
        "format": adapter.format,
        "base_model": adapter.base_model,
        "task": adapter.task,
        "components": list(adapter.components),
        "flattened": adapter.flattened,
        "parameters": sum(tensor.numel() for tensor in _tensors(adapter)),
        "dtypes": _dtypes(adapter),
        "layers": {
            path: {
                "method": layer.method,
                "hyperparameters": dict(layer.hyperparameters),
                "tensors": _described(layer.tensors),
            }
            for path, layer in adapter.layers.items()
        },
        "shared": _described(adapter.shared),
        "others": _described(adapter.others),
        "metadata": dict(adapter.metadata),
    }


def _described(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: {"dtype": type_of(tensor), "shape": list(tensor.shape)} for name, tensor in tensors.items()}


def _tensors(adapter: weights.AdapterFile) -> Iterator[Tensor]:
    """All tensors of an adapter."""
    own = chain.from_iterable(layer.tensors.values() for layer in adapter.layers.values())
    return chain(own, adapter.shared.values(), adapter.others.values())


def _dtypes(adapter: weights.AdapterFile) -> dict[str, int]:
    """Number of parameters by dtype."""
    count: Counter[str] = Counter()
    for tensor in _tensors(adapter):
        count[type_of(tensor)] += tensor.numel()
    return dict(count.most_common())


# Printing


def _show(console: Console, source: str, adapter: weights.AdapterFile) -> None:
    dtypes, size = _dtypes(adapter), sum(tensor.nbytes for tensor in _tensors(adapter))
    console.print(plain(source), style="bold", soft_wrap=True)
    facts(
        console,
        {
            "format": adapter.format or "",
            "base model": adapter.base_model or "",
            "task": adapter.task or "",
            "components": ", ".join(adapter.components),
            "layers": f"{len(adapter.layers):,}",
            "parameters": f"{sum(dtypes.values()):,} ({types(dtypes)}), {megabytes(size)}",
            "names": _of_names(adapter),
        },
    )
    console.print()
    _show_methods(console, adapter)
    _show_layers(console, adapter)
    besides = {"for all layers": adapter.shared, "for no layer": adapter.others}
    _show_entries(
        console,
        "Other tensors",
        {
            name: f"{what}, {shape_of(tensor.shape)} {type_of(tensor)}"
            for what, tensors in besides.items()
            for name, tensor in tensors.items()
        },
    )
    _show_entries(console, "Metadata", dict(_entries(adapter.metadata)))


def _of_names(adapter: weights.AdapterFile) -> str:
    """Description of unusual layer names in the file; empty for dotted paths."""
    if adapter.counted:
        return "numbered: only the base model tells which layers they are"
    return "flattened: only the base model tells where the dots were" if adapter.flattened else ""


def _show_methods(console: Console, adapter: weights.AdapterFile) -> None:
    table = columns("method", "layers", "parameters", "hyperparameters", right=("layers", "parameters"))
    for method in sorted({layer.method for layer in adapter.layers.values()}):
        own = [layer for layer in adapter.layers.values() if layer.method == method]
        count = sum(tensor.numel() for layer in own for tensor in layer.tensors.values())
        names = dict.fromkeys(name for layer in own for name in layer.hyperparameters)
        numbers = {name: _span(layer.hyperparameters.get(name) for layer in own) for name in names}
        told = ", ".join(f"{name} {value}" for name, value in numbers.items())
        table.add_row(plain(method), f"{len(own):,}", f"{count:,}", short(told))
    console.print(table)


def _span(values: Iterable[Any]) -> str:
    """`8`, `4 to 16` for different numbers, or some of the values."""
    from weights.formats.common.settings import is_number

    found = list({str(value): value for value in values}.values())
    if all(map(is_number, found)):
        return " to ".join(dict.fromkeys((f"{min(found):g}", f"{max(found):g}")))
    words = {"True": "yes", "False": "no"}
    told = [words.get(str(value), str(value)) for value in found[:_MOST_VALUES]]
    return " or ".join(told) + (" or others" if len(found) > _MOST_VALUES else "")


def _show_layers(console: Console, adapter: weights.AdapterFile) -> None:
    from weights.hub.layer_tree import drawn, numbers_apart

    console.print()
    described = {path: f"{plain(layer.method)}{_rank(layer)}" for path, layer in adapter.layers.items()}
    if adapter.flattened:  # So that layers whose names differ in numbers only are one line.
        described = {numbers_apart(path): text for path, text in described.items()}
    for line in drawn(described).splitlines():
        console.print(line, no_wrap=True, overflow="ellipsis")


def _rank(layer: weights.LayerWeights) -> str:
    """Rank of a layer, where it has one."""
    rank = layer.hyperparameters.get("rank")
    return f" rank {rank}" if type(rank) is int else ""


def _show_entries(console: Console, title: str, entries: Mapping[str, str]) -> None:
    if entries:
        console.print(f"\n{title}", style="bold")
    for name, text in entries.items():
        console.print(f"  {short(name)}  {short(text)}", no_wrap=True, overflow="ellipsis")


def _entries(metadata: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Entries of the metadata without `format`; tags are counted."""
    for name, text in sorted(metadata.items()):
        if name != "format":
            yield name, (_tags(text) if name == _TAGS else "") or text


def _tags(text: str) -> str:
    """The most frequent tags; empty where the entry cannot be parsed."""
    try:
        count: Counter[str] = Counter()
        for folder in json.loads(text).values():
            count.update({tag.strip(): int(number) for tag, number in folder.items()})
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return ""
    more = f" and {len(count) - _MOST_TAGS} more" if len(count) > _MOST_TAGS else ""
    return ", ".join(f"{tag} ({number})" for tag, number in count.most_common(_MOST_TAGS)) + more
