"""Embedding of integers."""

from __future__ import annotations

import torch
from torch import nn

from fluxion.module import WeightedModule


class Embedding(nn.Embedding, WeightedModule):
    """`torch.nn.Embedding`: integers `(...)` to rows of the weight `(..., embedding_dim)`.

    Example:
        >>> fl.Embedding(num_embeddings=100, embedding_dim=8)(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 8])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        padding_idx: int | None = None,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
