"""Mixed batches: one choice of patches for each row."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from adapters.activation.switch import Switch

Weights = Mapping[Switch, float]
"""A strength for each active patch."""


class Rows:
    """A choice for each row of a batch.

    Attributes:
        count: How many rows there are.
        groups: For each distinct choice, its weights and the indices of its rows.
        sizes: For each of them, how many rows these are.
        group_of_row: The number of each row's choice among the groups.
        order: The rows in the order of the groups; None if that is the order they are in.
        places: For each row, its place in that order.
    """

    def __init__(self, choices: Sequence[Weights]) -> None:
        self.count = len(choices)
        indices: dict[frozenset[tuple[Switch, float]], list[int]] = {}
        for index, weights in enumerate(choices):
            indices.setdefault(frozenset(weights.items()), []).append(index)
        found = list(indices.items())
        own, order = list(range(self.count)), _flat(found)
        if order != own:
            found.sort(key=lambda item: (not item[0], len(item[1])))  # Groups of one size can be computed together.
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
