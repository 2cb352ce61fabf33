"""A linear layer with low-rank updates beside it: `y = x Wᵀ + b + Σ s (x Aᵀ) Bᵀ`.

The cost beside the layer itself is memory traffic rather than arithmetic, so products are added to the output in place.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import linear as _linear

from adapters.activation.mixed_batch import Rows
from adapters.lowrank.low_rank import LowRank

_FEW = 4096  # Elements of an input, below which a call costs more than the arithmetic.
# Tokens of a row from which on an update for each row takes less than sorting them: in a loop, and in one product.
_MANY = (4, 32)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, update: LowRank) -> Tensor:
    """The output of a linear layer with an update beside it, `(..., outputs)`.

    Args:
        x: The input, `(..., inputs)`, of two dimensions or more.
        weight: `(outputs, inputs)`, in the dtype of the input.
        bias: `(outputs,)`.
        update: In the dtype of the input.
    """
    if x.numel() >= _FEW and not (update.dropout or torch.is_grad_enabled()) and _is_merging_cheaper(x, weight):
        return _linear(x, torch.addmm(weight, update.up, update.down, alpha=update.scale), bias)
    tokens = x if x.ndim == 2 else x.flatten(0, -2)  # In two dimensions no view is written to, which autograd copies.
    # Torch rounds a batch that is not contiguous in its own way: an update of zero has to change no bit of that.
    flat = x.ndim == 2 or x.is_contiguous()
    output = _linear(tokens, weight, bias) if flat else _linear(x, weight, bias).flatten(0, -2)
    if update.dropout:
        # Drawn whether there are gradients or not: reentrant checkpointing runs a layer in both ways.
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        inner = _dropped_linear(tokens, update.down, update.dropout, seed)
    else:
        inner = _linear(tokens, update.down)
    up, scale = update.up.t(), update.scale
    output = output.addmm_(inner, up) if scale == 1 else output.addmm_(inner, up, alpha=scale)  # A keyword costs time.
    return output if x.ndim == 2 else output.view(*x.shape[:-1], len(weight))


def _is_merging_cheaper(x: Tensor, weight: Tensor) -> bool:
    """Whether a merged weight costs clearly less: for many tokens, in a dtype that is precise enough for it."""
    outputs, inputs = weight.shape
    return x.numel() * (inputs + outputs) > 1.5 * inputs * inputs * outputs and x.dtype.itemsize >= 4


def linear_of_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, updates: Sequence[LowRank | None]
) -> Tensor:
    """The output of a linear layer for a mixed batch, without gradients.

    Args:
        x: The input, `(rows, ..., inputs)`.
        weight: `(outputs, inputs)`, in the dtype of the input.
        bias: `(outputs,)`.
        rows: The groups of rows with one choice.
        updates: The update of each group, without dropout, or None for the layer alone.
    """
    tokens = math.prod(x.shape[1:-1])  # Of each row.
    is_batched = x.dtype.itemsize < 4 or x.is_cuda  # Where a batched product takes less than several.
    order = rows.order if tokens < _MANY[is_batched] else None
    if order is not None:
        x = x.index_select(0, order.to(x.device))
    if order is rows.order:
        parts = [(size * tokens, update) for size, update in zip(rows.sizes, updates, strict=True)]
    else:
        parts = [(tokens, updates[number]) for number in rows.group_of_row.tolist()]
    output = _linear(x, weight, bias).contiguous()
    # Neighbours of one size, rank and scale go through one batched product.
    runs = [[*run] for _, run in itertools.groupby(parts, _kind)] if is_batched else [[part] for part in parts]
    sizes = [sum(size for size, _ in run) for run in runs]
    inputs, outputs = x.reshape(-1, x.shape[-1]).split(sizes), output.view(-1, output.shape[-1]).split(sizes)
    for run, some, result in zip(runs, inputs, outputs, strict=True):
        several = [update for _, update in run if update is not None]
        if len(several) > 1:
            down, up = torch.stack([one.down for one in several]), torch.stack([one.up for one in several])
            some, result = some.unflatten(0, (len(several), -1)), result.unflatten(0, (len(several), -1))
            result.baddbmm_(torch.bmm(some, down.mT), up.mT, alpha=several[0].scale)
        elif several:
            result.addmm_(_linear(some, several[0].down), several[0].up.t(), alpha=several[0].scale)
    return output if order is None else output.index_select(0, rows.places.to(x.device))


def _kind(part: tuple[int, LowRank | None]) -> object:
    count, update = part
    return update and (count, update.rank, update.scale)


class _DroppedLinear(torch.autograd.Function):
    """`(m ∘ x) Aᵀ` with a dropout mask `m` that backward draws again from its seed, as it is as large as the input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, dropout: float, seed: int) -> Tensor:
        mask = _mask(x, dropout, seed)
        ctx.save_for_backward(x, down)
        ctx.save_for_forward(x, down)
        ctx.settings = dropout, seed
        return _linear(mask.mul_(x), down)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, down = ctx.saved_tensors
        mask = _mask(x, *ctx.settings)
        for_x, for_down = ctx.needs_input_grad[:2]
        return (grad @ down) * mask if for_x else None, grad.mT @ (x * mask) if for_down else None, None, None

    @staticmethod
    def jvp(ctx: Any, x_tangent: Tensor | None, down_tangent: Tensor | None, *_: None) -> Tensor | None:
        x, down = ctx.saved_tensors
        mask = _mask(x, *ctx.settings)
        terms = [_linear(x_tangent * mask, down)] if x_tangent is not None else []
        terms += [_linear(x * mask, down_tangent)] if down_tangent is not None else []
        return sum(terms[1:], start=terms[0])


_dropped_linear = cast(Callable[[Tensor, Tensor, float, int], Tensor], _DroppedLinear.apply)


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
    # In one layout, whatever that of the input: saved tensors may come back in another one.
    mask = torch.empty_like(x, memory_format=torch.contiguous_format)
    return mask.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)
