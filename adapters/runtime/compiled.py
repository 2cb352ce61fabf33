"""Nodes in a compiled model: what is chosen is looked up whenever the graph runs, so that no choice needs a new one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from adapters.activation.mixed_batch import Rows
from adapters.errors import RowsError
from adapters.methods.core.method import Active, Branch


class Node(Protocol):
    """An adapted layer, as far as graphs ask for it."""

    @property
    def branches(self) -> Sequence[Branch]: ...

    @property
    def path(self) -> str: ...

    def chosen(self) -> Active | Rows: ...


_nodes: WeakValueDictionary[int, Node] = WeakValueDictionary()
_numbers: list[tuple[int, Tensor]] = []  # Those to give next, made many at a time, which is quicker.
_blocks = itertools.count()
_BLOCK = 1024


def number_of(node: Node) -> Tensor:
    """A new number for a node, by which graphs know it: an input of theirs, so that equal blocks share one graph."""
    while True:
        try:
            number, tensor = _numbers.pop()  # One thread gets it.
        except IndexError:
            start = next(_blocks) * _BLOCK
            _numbers.extend(enumerate(torch.arange(start, start + _BLOCK, device="cpu").unbind(), start))
        else:
            _nodes[number] = node
            return tensor


# What is looked up is not what a captured CUDA graph could repeat.
@torch.library.custom_op("adapters::strengths", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def strengths(x: Tensor, node: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """How strongly each branch of a node acts on each row of a batch, at the moment, in this thread or task.

    Args:
        x: The input of the layer, of which the number of rows counts.
        node: The number of the node.
        count: How many branches it has.
        dtype: The dtype of the result.

    Returns:
        `(rows, branches)`.

    Raises:
        RowsError: There is a choice for each row, and the input has another number of them.
    """
    here = _nodes[int(node)]
    branches, chosen, rows = here.branches, here.chosen(), x.shape[0]
    if isinstance(chosen, Rows):
        if chosen.count != rows:
            raise RowsError(
                f"rows= names {chosen.count} rows, but a compiled layer was given a batch of {rows}: name each.",
                here.path,
            )
        each = [[weights.get(branch.switch, 0.0) for branch in branches] for weights, _ in chosen.groups]
        table = torch.tensor(each, dtype=dtype)[chosen.group_of_row]
    else:
        acting = dict(chosen)
        table = torch.tensor([acting.get(branch, 0.0) for branch in branches], dtype=dtype).expand(rows, count).clone()
    return table.to(x.device)


@strengths.register_fake
def _(x: Tensor, node: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    return x.new_empty((x.shape[0], count), dtype=dtype)
