"""Thin matrices beside a linear layer: `y = x Wᵀ + b + Σ s (x Aᵀ) Bᵀ` in the least time and memory.

What takes time beside the layer itself is not arithmetic, of which there is little, but whatever is as large as an
output: so none is made besides the output.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from adapters.activation.mixed_batch import Rows

# Where the product of the two matrices is made first, its cost has to be clearly the lower one.
_MARGIN = 1.5
# Tokens of a row from which on sorting the rows takes longer than an adapter for each: in a loop, and in one product.
_MANY = (4, 32)
_FEW = 4096  # Elements of an input; with fewer than that, calls take longer than arithmetic.

# Without a search for them in their modules in each call.
_linear, _is_grad_enabled, _Parameter = functional.linear, torch.is_grad_enabled, nn.Parameter
_is_autocast_enabled = torch._C._is_any_autocast_enabled
_transform_level = torch._C._functorch.maybe_current_level

Pair = tuple[Tensor, Tensor, float, float]
"""Two matrices whose product is added to a weight: A, `(rank, inputs)`, and B, `(outputs, rank)`; what the product is
multiplied by; and the probability of dropping each input of A."""


def is_ready(x: Any, weight: Any, bias: Any) -> bool:
    """Whether the ways of this module may be gone: for plain tensors of one real dtype, outside of any transform."""
    return (
        type(x) is Tensor
        and type(weight) is _Parameter
        and (dtype := x.dtype) is weight.dtype
        and (bias is None or (type(bias) is _Parameter and bias.dtype is dtype))
        and dtype.is_floating_point
        and x.ndim > 1
        and not _is_autocast_enabled()
        and _transform_level() is None
        and forward_ad._current_level < 0
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, pairs: Sequence[Pair]) -> Tensor:
    """The output of a linear layer with some pairs beside it.

    Args:
        x: The input, `(..., inputs)`.
        weight: `(outputs, inputs)`, in the dtype of the input.
        bias: `(outputs,)`.
        pairs: One or more, in any dtype: they are converted to that of the input.
    """
    down, up, scale, dropout = pairs[0]
    dtype = x.dtype
    if len(pairs) > 1 or down.dtype is not dtype or up.dtype is not dtype:
        down, up, scale, dropout = joined(pairs, dtype)
    if dropout:
        # Made again from the same seed, whether there are gradients or not: checkpointing runs a layer in both ways.
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
    if _is_grad_enabled() and (
        down.requires_grad
        or up.requires_grad
        or x.requires_grad
        or weight.requires_grad
        or (bias is not None and bias.requires_grad)
    ):
        return _with_gradients(x, weight, bias, down, up, scale, dropout, seed if dropout else 0)
    if dropout:
        return _plus(_linear(x, weight, bias), _linear(_mask(x, dropout, seed).mul_(x), down), up, scale)
    if x.numel() >= _FEW and _is_merged_cheaper(x, weight):
        return _linear(x, torch.addmm(weight, up, down, alpha=scale), bias)
    return _plus(_linear(x, weight, bias), _linear(x, down), up, scale)


def linear_of_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, rows: Rows, pairs: Sequence[Sequence[Pair]]
) -> Tensor:
    """The output of a linear layer for a batch in which each row has pairs of its own, without gradients.

    Args:
        x: The input, `(rows, ..., inputs)`.
        weight: `(outputs, inputs)`, in the dtype of the input.
        bias: `(outputs,)`.
        rows: Which rows are in one group.
        pairs: Those of each group, which drop nothing.
    """
    dtype, tokens = x.dtype, math.prod(x.shape[1:-1])  # Of each row.
    joint = [joined(own, dtype) if own else None for own in pairs]
    together = dtype.itemsize < 4 or x.is_cuda  # Where one product of several matrices takes less than several.
    add = _add_together if together else _add_each
    order = rows.order if tokens < _MANY[together] else None
    if order is not None:
        x = x.index_select(0, order.to(x.device))
    if order is rows.order:
        parts = [(size * tokens, pair) for size, pair in zip(rows.sizes, joint, strict=True)]
    else:
        parts = [(tokens, joint[number]) for number in rows.group_of_row.tolist()]
    output = _linear(x, weight, bias).contiguous()
    add(output.view(-1, output.shape[-1]), x.reshape(-1, x.shape[-1]), parts)
    return output if order is None else output.index_select(0, rows.places.to(x.device))


Parts = list[tuple[int, Pair | None]]
"""For each group of tokens their number, and the pair that they have."""


def _add_each(output: Tensor, x: Tensor, parts: Parts) -> None:
    sizes = [size for size, _ in parts]
    for (_, pair), some, result in zip(parts, x.split(sizes), output.split(sizes), strict=True):
        if pair is not None:
            _plus(result, _linear(some, pair[0]), pair[1], pair[2])


def _add_together(output: Tensor, x: Tensor, parts: Parts) -> None:
    """Groups of one size behind one another go through one product of batches."""
    runs = [[*run] for _, run in itertools.groupby(parts, _alike)]
    sizes = [sum(size for size, _ in run) for run in runs]
    for run, some, result in zip(runs, x.split(sizes), output.split(sizes), strict=True):
        pairs = [pair for _, pair in run if pair]
        if len(pairs) > 1:
            down, up = torch.stack([pair[0] for pair in pairs]), torch.stack([pair[1] for pair in pairs])
            some, result = (rows.unflatten(0, (len(pairs), -1)) for rows in (some, result))
            _add(result, torch.bmm(some, down.mT), up.mT, pairs[0][2])
        elif pairs:
            _add_each(result, some, run)


def _alike(part: tuple[int, Pair | None]) -> object:
    """Equal for groups of one size with pairs of one rank and scale."""
    count, pair = part
    return pair and (count, len(pair[0]), pair[2])


def _add(output: Tensor, small: Tensor, up: Tensor, scale: float) -> Tensor:
    """Add a product of two matrices, or of two batches of them."""
    add = output.addmm_ if output.ndim == 2 else output.baddbmm_
    return add(small, up) if scale == 1 else add(small, up, alpha=scale)  # Which takes longer to be called.


def _plus(output: Tensor, small: Tensor, up: Tensor, scale: float) -> Tensor:
    """An output, `(..., outputs)`, to which the product with B of what A has made is added, in place if it can be."""
    if output.ndim == 2:
        return output.addmm_(small, up.t()) if scale == 1 else output.addmm_(small, up.t(), alpha=scale)
    output = output.contiguous()
    _add(output.view(-1, output.shape[-1]), small.flatten(0, -2), up.t(), scale)
    return output


def joined(pairs: Sequence[Pair], dtype: torch.dtype) -> Pair:
    """One pair, of as much rank as several have together; these drop nothing."""
    if len(pairs) == 1:
        down, up, scale, dropout = pair = pairs[0]
        return pair if down.dtype is dtype and up.dtype is dtype else (down.to(dtype), up.to(dtype), scale, dropout)
    downs, ups, scales = [pair[0] for pair in pairs], [pair[1] for pair in pairs], [pair[2] for pair in pairs]
    if any(tensor.dtype is not dtype for tensor in (*downs, *ups)):
        downs, ups = ([tensor.to(dtype) for tensor in tensors] for tensors in (downs, ups))
    if any(scale != scales[0] for scale in scales):
        ups, scales = [up * scale for up, scale in zip(ups, scales, strict=True)], [1.0]
    return torch.cat(downs), torch.cat(ups, 1), scales[0], 0.0


def _is_merged_cheaper(x: Tensor, weight: Tensor) -> bool:
    """Whether it takes less to make the weight of both together: for many tokens, and where it is exact enough."""
    outputs, inputs = weight.shape
    return x.numel() * (inputs + outputs) > _MARGIN * inputs * inputs * outputs and x.dtype.itemsize >= 4


class _WithGradients(torch.autograd.Function):
    """The same with gradients. Kept for them is the input, and of the size of the rank what A makes of it.

    Dropout keeps no mask, but the seed to make it again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        dropped = _mask(x, dropout, seed).mul_(x) if dropout else x
        small = _linear(dropped, down)
        output = _plus(_linear(x, weight, bias), small, up, scale)
        ctx.save_for_backward(x, weight, down, up, small)
        ctx.settings = scale, dropout, seed
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, down, up, small = ctx.saved_tensors
        scale, dropout, seed = ctx.settings
        for_x, for_weight, for_bias, for_down, for_up, *_ = ctx.needs_input_grad
        shape, mask = x.shape, None
        if dropout and (for_x or for_down):
            mask = _mask(x, dropout, seed).flatten(0, -2)
        if len(shape) > 2:
            x, small = x.flatten(0, -2), small.flatten(0, -2)
            grad = grad.reshape(len(x), len(weight))  # It may be a batch of gradients, which torch does not flatten.
        if _is_grad_enabled():  # Gradients of gradients: what was kept knows nothing of where it came from.
            small = _linear(x if mask is None else x * mask, down)
        grads: list[Tensor | None] = [None] * 8
        if for_x or for_down:
            inner = _scaled(grad @ up, scale)
        if for_x:
            plain = grad @ weight
            plain = plain.addmm_(inner, down) if mask is None else plain.addcmul_(inner @ down, mask)
            grads[0] = plain if len(shape) == 2 else plain.view(shape)
        if for_weight:
            grads[1] = grad.t() @ x
        if for_bias:
            grads[2] = grad.sum(0)
        if for_down:
            grads[3] = inner.t() @ (x if mask is None else x * mask)
        if for_up:
            grads[4] = grad.t() @ _scaled(small, scale)
        return tuple(grads)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _mask(x: Tensor, dropout: float, seed: int) -> Tensor:
    generator = None if x.is_meta else torch.Generator(x.device).manual_seed(seed)
    # In one layout, whatever that of the input: what is kept for gradients may come back in another one.
    mask = torch.empty_like(x, memory_format=torch.contiguous_format)
    return mask.bernoulli_(1 - dropout, generator=generator).div_(1 - dropout)


_with_gradients = cast(Callable[..., Tensor], _WithGradients.apply)
