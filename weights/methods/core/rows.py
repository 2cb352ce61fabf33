"""The rows of an adapted layer, one for each output: some of them, as an adapter of their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate

import torch

from weights.adapter_file import Hyperparameter, LayerWeights
from weights.discovery import stated


@dataclass(frozen=True)
class RowAxes:
    """The tensors of a method that have a row for each output of the layer, in their first axis.

    Attributes:
        method: The key of the method.
        by_row: The names of these tensors, with spaces between them.
        common: The names of those that are for all outputs.
        rows_of_block: Returns how many outputs belong to one row.
        of_rows: Returns the hyperparameters that depend on how many rows a layer has.
        own_rank: Returns one of several parts of a layer, without the ranks of the others if each has its own.
    """

    method: str
    by_row: str
    common: str = ""
    rows_of_block: Callable[[LayerWeights], int] = lambda layer: 1
    of_rows: Callable[[LayerWeights, int], Mapping[str, Hyperparameter]] = lambda layer, rows: {}
    own_rank: Callable[[LayerWeights, int], LayerWeights] = lambda layer, parts: layer


@cache
def _row_axes() -> Mapping[str, RowAxes]:
    return {axes.method: axes for some in stated("weights.methods", "ROWS", RowAxes).values() for axes in some}


def split_rows(layer: LayerWeights, sizes: Sequence[int]) -> list[LayerWeights]:
    """Cut a layer into parts that have so many rows each.

    Of a LoRA whose parts were trained apart, each gets its own ranks back: those outside of which its rows of B are 0.

    Raises:
        ValueError: The layer has another number of rows, or its method does not allow it; the message states the
            problem.
    """
    ends = list(accumulate(sizes))
    rows = [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]
    parts = [take_rows(layer, [part], ends[-1]) for part in rows]
    return [_row_axes()[layer.method].own_rank(part, len(sizes)) for part in parts]


def take_rows(layer: LayerWeights, rows: Sequence[range], of: int) -> LayerWeights:
    """Some rows of a layer, in an order of their own, out of so many.

    Raises:
        ValueError: The layer has another number of rows, or its method does not allow it; the message states the
            problem.
    """
    tensors = layer.tensors
    axes = _row_axes().get(layer.method)
    by_row = tensors.keys() & axes.by_row.split() if axes else set()
    # An initialisation that is made from the weight is another one for each part.
    if axes is None or not by_row or not tensors.keys() <= {*by_row, *axes.common.split()} or _mixes_rows(layer):
        raise ValueError(f"{layer.method} with {', '.join(sorted(tensors))}, whose rows cannot be told apart")
    size = axes.rows_of_block(layer)
    for name in by_row:
        if tensors[name].ndim < 1 or len(tensors[name]) * size != of:
            raise ValueError(f"a {name} {tuple(tensors[name].shape)}, not of {of} rows")
    if any(end % size for part in rows for end in (part.start, part.stop)):
        raise ValueError(f"{layer.method} in blocks of {size} rows, which do not end where the parts do")
    taken = {
        name: torch.cat([tensor[part.start // size : part.stop // size] for part in rows])
        if name in by_row
        else tensor.clone()
        for name, tensor in tensors.items()
    }
    numbers = axes.of_rows(layer, sum(map(len, rows)) // size)
    return LayerWeights(layer.method, {**layer.hyperparameters, **numbers}, taken)


def _mixes_rows(layer: LayerWeights) -> bool:
    """Whether one row depends on the others: by an initialisation, or by lengths of inputs."""
    return "init" in layer.hyperparameters or bool(layer.hyperparameters.get("on_inputs"))
