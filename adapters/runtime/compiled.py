"""Nodes in a compiled model: the activation is looked up whenever a graph runs, so that no choice needs a new one."""

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


class Branched(Protocol):
    """A node, as far as graphs ask for it."""

    @property
    def branches(self) -> Sequence[Branch]: ...

    @property
    def path(self) -> str: ...

    def active_branches(self) -> Active | Rows: ...


_nodes: WeakValueDictionary[int, Branched] = WeakValueDictionary()
_numbers: list[tuple[int, Tensor]] = []  # The next ones, made many at a time, which is quicker.
_blocks = itertools.count()
_BLOCK = 1024


def number_of(node: Branched) -> Tensor:
    """A new key of a node in compiled graphs: an input of theirs, so that equal blocks share one graph."""
    while True:
        try:
            number, tensor = _numbers.pop()  # One thread gets it.
        except IndexError:
            start = next(_blocks) * _BLOCK
            _numbers.extend(enumerate(torch.arange(start, start + _BLOCK, device="cpu").unbind(), start))
        else:
            _nodes[number] = node
            return tensor


# A captured CUDA graph could not repeat the look-up.
@torch.library.custom_op("adapters::strengths", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def strengths(x: Tensor, node: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """The strength of each branch of a node for each row of a batch, at the moment, in this thread or task.

    Args:
        x: The input of the layer, which has a row for each sample.
        node: The key of the node.
        count: The number of its branches.
        dtype: The dtype of the result.

    Returns:
        `(rows, branches)`.

    Raises:
        RowsError: The batch is mixed, and the input has another number of rows.
    """
    here = _nodes[int(node)]
    branches, chosen, rows = here.branches, here.active_branches(), x.shape[0]
    if isinstance(chosen, Rows):
        if chosen.count != rows:
            raise RowsError(
                f"rows= has {chosen.count} entries for a batch of {rows}, in a compiled layer: give one for each row.",
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
