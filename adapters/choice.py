"""What was chosen for the current thread or async task: a strength for each patch, or a choice for each row."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adapters.errors import AdapterError, RowsError, TargetError
from adapters.layers import first_tensor, rebuilt

if TYPE_CHECKING:
    from adapters.branch import Branch
    from adapters.patch import Patch

Weights = Mapping["Patch", float]
Active = list[tuple["Branch", float]]
"""Branches that act, in the order of their injection, and how strongly."""

# Patches that are not in the mapping follow their own `scale` and `enabled`.
_chosen: ContextVar[Mapping[Patch, float | Rows] | None] = ContextVar("chosen", default=None)
current = _chosen.get


@contextlib.contextmanager
def choosing(choice: Mapping[Patch, float | Rows]) -> Iterator[None]:
    """Add to what is chosen, in this block and in this thread or async task."""
    token = _chosen.set({**(_chosen.get() or {}), **choice})
    try:
        yield
    finally:
        _chosen.reset(token)


def strength(patch: Patch, choice: Mapping[Patch, float | Rows] | None) -> float | Rows:
    """How strongly a patch acts where this is chosen, or what is chosen for each row."""
    scale = choice.get(patch) if choice else None
    return (patch._scale if patch.enabled else 0.0) if scale is None else scale


def acting(branches: Iterable[Branch]) -> Active | Rows:
    """Which of the branches of a node act, and how strongly, or what is chosen for each row."""
    choice, active = current(), []
    for branch in branches:
        scale = strength(branch.patch, choice)
        if isinstance(scale, Rows):
            return scale
        if scale:
            active.append((branch, scale))
    return active


def finite(scale: float, what: str) -> float:
    """A scale, or an AdapterError for what is no finite number."""
    if not isinstance(scale, Real) or not math.isfinite(scale):
        raise AdapterError(f"{what} has to be a finite number, not {scale!r}.")
    return float(scale)


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
        indices: dict[frozenset[tuple[Patch, float]], list[int]] = {}
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

    def run(
        self, layer: nn.Module, compose: Callable[[Weights], Callable[..., Any]], args: tuple[Any, ...], kwargs: Any
    ) -> Any:
        """Run a layer once for each distinct choice, on the rows that made it, and put the outputs in order.

        Args:
            layer: Says which dimension of its inputs is the batch.
            compose: Gives what runs for one choice.
            args: The inputs, the first of them a batch.
            kwargs: More inputs.

        Raises:
            RowsError: The batch does not have as many rows as there are choices.
        """
        dim, block = 0, 1
        if isinstance(layer, nn.MultiheadAttention):
            args, kwargs = (), {**dict(zip(_ATTENTION_INPUTS, args, strict=False)), **kwargs}
            dim = 0 if layer.batch_first else 1
        first = first_tensor((*args, *kwargs.values()))
        size = first.shape[dim] if first is not None and first.ndim > dim else 0
        if any(parameter is not None and parameter.ndim == 3 for parameter in layer._parameters.values()):
            block = max(size // self.count, 1)  # Experts are given the tokens of all rows, row after row.
        shared = size == 1 < self.count  # Such as the positions of every row: each choice makes its own of it.
        if size != block * self.count and not shared:
            raise RowsError(f"rows= names {self.count} rows, but a layer was given a batch of {size}: name each.")

        outputs, taken = [], []
        ours = [patch for patch, choice in (current() or {}).items() if choice is self]
        for weights, rows in self.groups:
            index = (
                torch.zeros(1, dtype=torch.long) if shared else (rows[:, None] * block + torch.arange(block)).flatten()
            )
            some = _take(args, index, size, dim)
            named = _take(kwargs, index, size, dim)
            with choosing({**dict.fromkeys(ours, 0.0), **weights}):  # For adapted layers inside of this one.
                outputs.append(compose(weights)(*some, **named))
            _check(outputs[-1], dim, len(index))
            taken.append(index)
        order = self.group_of_row if shared else torch.argsort(torch.cat(taken))
        return _join(outputs, order, dim)


def _flat(found: Iterable[tuple[object, list[int]]]) -> list[int]:
    return [row for _, rows in found for row in rows]


_ATTENTION_INPUTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")


def _take(value: Any, index: Tensor, size: int, dim: int, name: str = "") -> Any:
    """Some rows of an input, or of those in a tuple, a list or a dict; what has not `size` rows belongs to all."""
    if isinstance(value, (tuple, list)):
        return rebuilt(value, [_take(part, index, size, dim, name) for part in value])
    if type(value) is dict:
        return {key: _take(part, index, size, dim, key) for key, part in value.items()}
    if not isinstance(value, Tensor):
        if hasattr(value, "update"):  # Such as a cache, which each choice would fill with its own rows.
            raise RowsError(f"rows= cannot divide a {type(value).__name__} into rows: pass use_cache=False.")
        return value
    index = index.to(value.device)
    if name == "attn_mask":  # Shared when it has no batch; else (batch * heads, queries, keys).
        return value.unflatten(0, (size, -1))[index].flatten(0, 1) if value.ndim == 3 else value
    batch = 0 if name == "key_padding_mask" else dim
    fits = value.ndim > batch and value.shape[batch] == size
    return value.index_select(batch, index) if fits else value


def _check(output: Any, dim: int, size: int) -> None:
    """Refuse an output that does not have a row for each row of the input, such as one that has no batch."""
    output = tuple(output.values()) if isinstance(output, Mapping) else output
    for part in output if isinstance(output, tuple) else (output,):
        if part is None:  # The weights that attention was not asked for.
            continue
        if not isinstance(part, Tensor) or part.ndim <= dim or part.shape[dim] != size:
            made = f"a tensor of shape {tuple(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            hint = ": pass use_cache=False" if hasattr(part, "update") else ""
            raise RowsError(
                f"rows= needs a row of output for each row of input: a layer made {made} of {size} rows{hint}."
            )
        dim = 0  # What follows the output of attention has the batch in front.


def _join(outputs: list[Any], inverse: Tensor, dim: int) -> Any:
    first = outputs[0]
    if isinstance(first, Mapping):
        joined: Any = copy.copy(first)
        for key, part in zip(first, _join([tuple(output.values()) for output in outputs], inverse, dim), strict=True):
            joined[key] = part
        return joined
    if isinstance(first, tuple):
        parts = [list(part) for part in zip(*outputs, strict=True)]
        return tuple(_join(part, inverse, 0 if number else dim) for number, part in enumerate(parts))
    if first is None:
        return None
    return torch.cat(outputs, dim).index_select(dim, inverse.to(first.device))


class NoWeight(Tensor):
    """The weight of a layer whose adapters are no change of weights: it has a shape and a dtype, but no values.

    Torch's fused kernels step aside for tensors of a class of its own, and call the layer instead.
    """

    @classmethod
    def error(cls) -> AdapterError:
        """What to raise when the values are asked for."""
        return TargetError("A layer that is read by its weight cannot have an adapter that is no change of weights.")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise cls.error()


class RowWeight(NoWeight):
    """The weight of a layer while rows have weights of their own."""

    @classmethod
    def error(cls) -> AdapterError:
        return RowsError("A layer that is read by its weight cannot have different adapters for each row.")
