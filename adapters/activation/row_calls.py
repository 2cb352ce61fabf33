"""Calls of a layer with a mixed batch: one call for each distinct choice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.activation.context import activated, current
from adapters.activation.mixed_batch import Rows, Weights
from adapters.errors import RowsError
from adapters.layers.calls import first_tensor, rebuilt

_ATTENTION_INPUTS = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask", "average_attn_weights")


def run_rows(
    rows: Rows,
    layer: nn.Module,
    compose: Callable[[Weights], Callable[..., Any]],
    args: tuple[Any, ...],
    kwargs: Any,
) -> Any:
    """Run a layer once for each distinct choice, on the rows that made it, and put the outputs in order.

    Args:
        rows: The mixed batch.
        layer: The layer, whose class tells which dimension of its inputs is the batch.
        compose: Returns the callable for one choice.
        args: The positional inputs, the first of them a batch.
        kwargs: The keyword inputs.

    Raises:
        RowsError: An input or an output does not have a row for each choice.
    """
    dim, block = 0, 1
    if isinstance(layer, nn.MultiheadAttention):
        args, kwargs = (), {**dict(zip(_ATTENTION_INPUTS, args, strict=False)), **kwargs}
        dim = 0 if layer.batch_first else 1
    first = first_tensor((*args, *kwargs.values()))
    size = first.shape[dim] if first is not None and first.ndim > dim else 0
    if any(parameter is not None and parameter.ndim == 3 for parameter in layer._parameters.values()):
        block = max(size // rows.count, 1)  # Experts take the tokens of all rows, row after row.
    shared = size == 1 < rows.count  # Such as the positions of every row, which each choice maps by itself.
    if size != block * rows.count and not shared:
        raise RowsError(f"rows= has {rows.count} entries for a batch of {size}: give one for each row.")

    outputs, taken = [], []
    ours = [patch for patch, choice in (current() or {}).items() if choice is rows]
    for weights, own in rows.groups:
        index = torch.zeros(1, dtype=torch.long) if shared else (own[:, None] * block + torch.arange(block)).flatten()
        some = _take(args, index, size, dim)
        named = _take(kwargs, index, size, dim)
        with activated({**dict.fromkeys(ours, 0.0), **weights}):  # For adapted layers inside of this one.
            outputs.append(compose(weights)(*some, **named))
        _check(outputs[-1], dim, len(index))
        taken.append(index)
    order = rows.group_of_row if shared else torch.argsort(torch.cat(taken))
    return _join(outputs, order, dim)


def _take(value: Any, index: Tensor, size: int, dim: int, name: str = "") -> Any:
    """Some rows of an input, or of those in a tuple, list or dict; an input of another size is shared by all rows."""
    if isinstance(value, (tuple, list)):
        return rebuilt(value, [_take(part, index, size, dim, name) for part in value])
    if type(value) is dict:
        return {key: _take(part, index, size, dim, key) for key, part in value.items()}
    if not isinstance(value, Tensor):
        if hasattr(value, "update"):  # Such as a cache, which each choice would fill with its own rows.
            raise RowsError(f"rows= cannot split a {type(value).__name__} into rows: pass use_cache=False.")
        return value
    index = index.to(value.device)
    if name == "attn_mask":  # Shared when it has no batch; else (batch * heads, queries, keys).
        return value.unflatten(0, (size, -1))[index].flatten(0, 1) if value.ndim == 3 else value
    batch = 0 if name == "key_padding_mask" else dim
    fits = value.ndim > batch and value.shape[batch] == size
    return value.index_select(batch, index) if fits else value


def _check(output: Any, dim: int, size: int) -> None:
    """Raise a RowsError for an output without a row for each row of the input, such as one without a batch."""
    output = tuple(output.values()) if isinstance(output, Mapping) else output
    for part in output if isinstance(output, tuple) else (output,):
        if part is None:  # Attention weights that were not asked for.
            continue
        if not isinstance(part, Tensor) or part.ndim <= dim or part.shape[dim] != size:
            made = f"a tensor of shape {tuple(part.shape)}" if isinstance(part, Tensor) else f"a {type(part).__name__}"
            hint = ": pass use_cache=False" if hasattr(part, "update") else ""
            raise RowsError(
                f"rows= needs a row of output for each row of input: a layer returned {made} for {size} rows{hint}."
            )
        dim = 0  # The other outputs of attention have the batch in front.


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
