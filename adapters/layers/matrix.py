"""`Matrix`, a weight as a matrix of outputs by inputs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn

from adapters.layers.kinds import CONVOLUTIONS, TRANSPOSED, UNSUPPORTED, is_conv1d
from adapters.layers.quantized import logical_shape
from adapters.layers.weight import is_norm_source, read_weight


@dataclass(frozen=True)
class Matrix:
    """A weight seen as a matrix of outputs by inputs.

    Attributes:
        shape: `(outputs, inputs)`, or `(experts, outputs, inputs)` for a stack of matrices.
        layout: The layout in the weight: `"rows"`, one flattened row per output; `"columns"`, its transpose; `"as is"`;
            `"transposed"`, that of a transposed convolution.
        kind: The use in the layer: `"linear"`, `"convolution"`, `"embedding"`, `"stack"` of several matrices, or
            `"any"` for a tensor that is taken as it is.
        groups: Groups of a convolution: each has an equal part of the rows, with inputs of its own.

    Example:
        >>> Matrix.of(nn.Conv2d(3, 8, 5), "weight").shape
        (8, 75)
    """

    shape: tuple[int, ...]
    layout: str
    kind: str
    groups: int = 1

    @classmethod
    def whole(cls, layer: nn.Module, parameter: str) -> Matrix | None:
        """A parameter of any shape as it is; None where there is none, or none that can be adapted."""
        if isinstance(layer, UNSUPPORTED) or is_norm_source(layer, parameter):
            return None
        weight = layer._parameters.get(parameter)
        if weight is None and hasattr(layer, parameter):
            weight = cast(nn.Parameter, read_weight(layer, parameter))
        return cls(tuple(logical_shape(weight)), "as is", "any") if isinstance(weight, Tensor) else None

    @classmethod
    def of(cls, layer: nn.Module, parameter: str) -> Matrix | None:
        """The matrix of a parameter of a layer, or None where it cannot be adapted."""
        if isinstance(layer, UNSUPPORTED):
            return None
        if parameter != "weight":
            bare = layer._parameters.get(parameter)
            if bare is None or bare.ndim not in (2, 3):
                return None
            return cls(tuple(bare.shape), "as is", "stack" if bare.ndim == 3 else "linear")
        if isinstance(layer, nn.Linear):
            return _matrix((layer.out_features, layer.in_features), "rows", "linear")
        if isinstance(layer, nn.Embedding):
            return _matrix((layer.embedding_dim, layer.num_embeddings), "columns", "embedding")
        if isinstance(layer, CONVOLUTIONS):
            inputs = layer.in_channels // layer.groups * torch.Size(layer.kernel_size).numel()
            return _matrix((layer.out_channels, inputs), "rows", "convolution", layer.groups)
        if isinstance(layer, TRANSPOSED):
            inputs = layer.in_channels // layer.groups * torch.Size(layer.kernel_size).numel()
            return cls((layer.out_channels, inputs), "transposed", "convolution", layer.groups)
        if is_conv1d(layer):
            inputs, outputs = cast(Tensor, layer.weight).shape
            return _matrix((outputs, inputs), "columns", "linear")
        return None

    def read(self, weight: Tensor) -> Tensor:
        """A weight as a matrix, sharing its memory where the layout allows."""
        if self.layout == "columns":
            return weight.T
        if self.layout == "transposed":
            # (inputs, outputs / groups, ...): each group of inputs has outputs of its own.
            return weight.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(2).flatten(0, 1)
        return weight if self.layout == "as is" else weight.flatten(1)

    def write(self, matrix: Tensor, like: Tensor) -> Tensor:
        """A matrix as a weight, of the shape of another weight."""
        if self.layout == "columns":
            return matrix.T
        if self.layout == "transposed":
            inputs = like.shape[0] // self.groups
            grouped = matrix.unflatten(0, (self.groups, -1)).unflatten(2, (inputs, *like.shape[2:]))
            return grouped.transpose(1, 2).flatten(0, 1)
        return matrix.view_as(like)


# A model has few different ones, and asks for each several times.
_matrix = lru_cache(maxsize=1024)(Matrix)
