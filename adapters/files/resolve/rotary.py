"""The order of the outputs that a rotary embedding turns by pairs, where a file has another than the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

import weights
from adapters.errors import LayerMismatchError


def in_halves(model: nn.Module, file: weights.AdapterFile) -> weights.AdapterFile:
    """A file with the first numbers of all pairs of a head before the second ones, as transformers has them.

    Raises:
        LayerMismatchError: The model does not say how large its heads are, or a layer is not made of such heads.
    """
    if not file.interleaved.intersection(file.layers):
        return file
    size = _head_size(model)
    layers = dict(file.layers)
    for path in file.interleaved.intersection(layers):
        tensors = layers[path].tensors
        rows = tensors["lora_B"]
        if rows.shape[0] % size:
            raise LayerMismatchError(f"{path} has {rows.shape[0]} outputs, the model has heads of {size}.")
        layers[path] = replace(layers[path], tensors={**tensors, "lora_B": _reordered(rows, size)})
    return replace(file, layers=layers, interleaved=frozenset())


def _reordered(rows: Tensor, size: int) -> Tensor:
    return rows.unflatten(0, (-1, size // 2, 2)).transpose(1, 2).reshape(rows.shape)


def _head_size(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    size = getattr(config, "head_dim", None)
    if size is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        size = width // heads
    if not isinstance(size, int) or size < 2 or size % 2:
        raise LayerMismatchError(
            f"The file orders the outputs of attention by heads, and this {type(model).__name__} does not say how large"
            " they are: its config needs hidden_size and num_attention_heads, or head_dim."
        )
    return size
