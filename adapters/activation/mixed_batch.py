"""Mixed batches: one choice of patches for each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from adapters.activation.switch import Switch

Weights = Mapping[Switch, float]
"""A strength for each active patch."""


class Rows:
    """A mixed batch: a choice of patches for each row.

    Attributes:
        count: The number of rows.
        groups: For each distinct choice, its strengths and the indices of its rows.
        sizes: The number of rows of each group.
        group_of_row: The index of each row's group.
        order: The rows sorted by group; None if they are already.
        places: The index of each row in that order.
    """

    def __init__(self, choices: Sequence[Weights]) -> None:
        self.count = len(choices)
        indices: dict[frozenset[tuple[Switch, float]], tuple[Weights, list[int]]] = {}
        for index, weights in enumerate(choices):
            # Of equal choices the first one's order counts: sums are to have the same last bits in each run.
            indices.setdefault(frozenset(weights.items()), (dict(weights), []))[1].append(index)
        found = list(indices.values())
        own, order = list(range(self.count)), _flat(found)
        if order != own:
            found.sort(key=lambda item: (not item[0], len(item[1])))  # Neighbours of one size are computed together.
            order = _flat(found)
        ordered = torch.tensor(order)
        self.order = None if order == own else ordered
        self.places = torch.argsort(ordered)
        self.sizes = [len(rows) for _, rows in found]
        numbers = {row: number for number, (_, rows) in enumerate(found) for row in rows}
        self.group_of_row = torch.tensor([numbers[row] for row in own])
        parts = ordered.split(self.sizes)
        self.groups: list[tuple[Weights, Tensor]] = [
            (dict(key), part) for (key, _), part in zip(found, parts, strict=True)
        ]


def _flat(found: Iterable[tuple[object, list[int]]]) -> list[int]:
    return [row for _, rows in found for row in rows]
