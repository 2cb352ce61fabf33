"""Multi-head attention (arXiv:1706.03762)."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from fluxion.chain import Chain
from fluxion.combinators import Distribute, Parallel
from fluxion.context import Contexts
from fluxion.errors import ChainValueError
from fluxion.layers.basics import Identity
from fluxion.layers.linear import Linear
from fluxion.leaves import SetContext, UseContext
from fluxion.module import Module


class ScaledDotProductAttention(Module):
    """Scaled dot-product attention: `softmax(q kᵀ / √d) v` for each head, of width `d`.

    Shapes: query `(batch, queries, dim)`, key and value `(batch, keys, dim)`; output `(batch, queries, dim)`.

    Raises:
        ChainValueError: An input has another shape, or `num_heads` does not divide `dim`.

    Example:
        >>> q, k, v = torch.ones(1, 4, 8), torch.ones(1, 6, 8), torch.ones(1, 6, 8)
        >>> fl.ScaledDotProductAttention(num_heads=2)(q, k, v).shape
        torch.Size([1, 4, 8])
    """

    def __init__(
        self,
        num_heads: int = 1,
        is_causal: bool = False,
        is_optimized: bool = True,
        slice_size: int | None = None,
    ) -> None:
        """
        Args:
            num_heads: Number of heads that `dim` is divided into.
            is_causal: Query `i` sees keys `0..i` only.
            is_optimized: Use torch's fused kernels instead of the explicit formula.
            slice_size: Number of queries to compute at a time, to use less memory.
        """
        super().__init__()
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.is_optimized = is_optimized
        self.slice_size = slice_size

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (self._split_heads(x) for x in (query, key, value))
        if self.slice_size is None:
            output = self._attend(query, key, value, first_query=0)
        else:
            starts = range(0, query.shape[2], self.slice_size)
            slices = zip(starts, query.split(self.slice_size, dim=2), strict=True)
            output = torch.cat([self._attend(part, key, value, start) for start, part in slices], dim=2)
        return output.transpose(1, 2).flatten(start_dim=2)

    def _split_heads(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[-1] % self.num_heads:
            raise ChainValueError(
                f"Attention with {self.num_heads} heads takes (batch, length, dim) with dim a multiple of"
                f" {self.num_heads}, not {tuple(x.shape)}."
            )
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, first_query: int) -> Tensor:
        whole = first_query == 0 and self.slice_size is None
        if self.is_optimized and whole:
            return functional.scaled_dot_product_attention(query, key, value, is_causal=self.is_causal)
        mask = self._causal_mask(query, key, first_query) if self.is_causal else None
        if self.is_optimized:
            return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf)
        return scores.softmax(dim=-1) @ value

    @staticmethod
    def _causal_mask(query: Tensor, key: Tensor, first_query: int) -> Tensor:
        ones = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
        return ones.tril(diagonal=first_query)


class Attention(Chain):
    """Multi-head attention, with projections of query, key, value and output.

    Shapes: query `(batch, queries, embedding_dim)`, key `(batch, keys, key_embedding_dim)`, value
    `(batch, keys, value_embedding_dim)`; output `(batch, queries, embedding_dim)`.

    Raises:
        ChainValueError: `num_heads` does not divide the inner dimension.

    Example:
        >>> attention = fl.Attention(embedding_dim=8, num_heads=2, key_embedding_dim=6, value_embedding_dim=6)
        >>> attention(torch.ones(1, 4, 8), torch.ones(1, 5, 6), torch.ones(1, 5, 6)).shape
        torch.Size([1, 4, 8])
    """

    def __init__(
        self,
        embedding_dim: int,
        num_heads: int = 1,
        key_embedding_dim: int | None = None,
        value_embedding_dim: int | None = None,
        inner_dim: int | None = None,
        use_bias: bool = True,
        is_causal: bool = False,
        is_optimized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        inner = inner_dim or embedding_dim
        if inner % num_heads:
            raise ChainValueError(f"The inner dimension {inner} is not a multiple of num_heads={num_heads}.")
        self.embedding_dim = embedding_dim
        self.num_heads = num_heads
        self.heads_dim = inner // num_heads
        self.key_embedding_dim = key_embedding_dim or embedding_dim
        self.value_embedding_dim = value_embedding_dim or embedding_dim
        self.inner_dim = inner
        self.use_bias = use_bias
        self.is_causal = is_causal
        self.is_optimized = is_optimized
        widths = (embedding_dim, self.key_embedding_dim, self.value_embedding_dim)
        super().__init__(
            Distribute(Linear(width, inner, use_bias, device=device, dtype=dtype) for width in widths),
            ScaledDotProductAttention(num_heads, is_causal, is_optimized),
            Linear(inner, embedding_dim, device=device, dtype=dtype),
        )


class SelfAttention(Attention):
    """Multi-head attention of a sequence to itself.

    Shapes: `(batch, length, embedding_dim)` in and out.

    Example:
        >>> fl.SelfAttention(embedding_dim=8, num_heads=2)(torch.ones(1, 4, 8)).shape
        torch.Size([1, 4, 8])
    """

    def __init__(
        self,
        embedding_dim: int,
        inner_dim: int | None = None,
        num_heads: int = 1,
        use_bias: bool = True,
        is_causal: bool = False,
        is_optimized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embedding_dim=embedding_dim,
            inner_dim=inner_dim,
            num_heads=num_heads,
            use_bias=use_bias,
            is_causal=is_causal,
            is_optimized=is_optimized,
            device=device,
            dtype=dtype,
        )
        self.insert(0, Parallel(Identity(), Identity(), Identity()))


class SelfAttention2d(SelfAttention):
    """Multi-head attention of the pixels of an image to each other.

    Shapes: `(batch, channels, height, width)` in and out.

    Example:
        >>> fl.SelfAttention2d(channels=8, num_heads=2)(torch.ones(1, 8, 4, 4)).shape
        torch.Size([1, 8, 4, 4])
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        use_bias: bool = True,
        is_causal: bool = False,
        is_optimized: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.channels = channels
        super().__init__(
            embedding_dim=channels,
            num_heads=num_heads,
            use_bias=use_bias,
            is_causal=is_causal,
            is_optimized=is_optimized,
            device=device,
            dtype=dtype,
        )
        self.insert(0, _PixelsToSequence())
        self.append(_SequenceToPixels())

    def init_context(self) -> Contexts:
        return {"reshape": {"size": None}}


class _PixelsToSequence(SetContext):
    """Flattens `(batch, channels, height, width)` to `(batch, height * width, channels)`, and stores the size."""

    def __init__(self) -> None:
        super().__init__("reshape", "size")

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x.shape[2:])
        return x.flatten(start_dim=2).transpose(1, 2)


class _SequenceToPixels(UseContext):
    """Unflattens `(batch, height * width, channels)` to `(batch, channels, height, width)`."""

    def __init__(self) -> None:
        super().__init__("reshape", "size")

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).unflatten(2, super().forward())
