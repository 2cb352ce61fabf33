"""The order of the outputs that a rotary embedding turns by pairs, where a file has another than the model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

import weights
from adapters.errors import LayerMismatchError


def in_halves(config: object, file: weights.AdapterFile) -> weights.AdapterFile:
    """A file with the first numbers of all pairs of a head before the second ones, as transformers has them.

    Args:
        config: The settings of the model.
        file: The adapter.

    Raises:
        LayerMismatchError: The settings do not say how large the heads are, or a layer is not made of such heads.
    """
    if not file.interleaved.intersection(file.layers):
        return file
    size = _head_size(config)
    layers = dict(file.layers)
    for path in file.interleaved.intersection(layers):
        tensors = layers[path].tensors
        rows = tensors["lora_B"]
        if rows.shape[0] % size:
            raise LayerMismatchError(f"{path} has {rows.shape[0]} outputs, the model has heads of {size}.")
        layers[path] = replace(layers[path], tensors={**tensors, "lora_B": interleaved_to_halves(rows, size)})
    return replace(file, layers=layers, interleaved=frozenset())


def interleaved_to_halves(rows: Tensor, head_size: int) -> Tensor:
    """The rows of heads in which both numbers of a pair are side by side, with them half a head apart instead."""
    return rows.unflatten(0, (-1, head_size // 2, 2)).transpose(1, 2).reshape(rows.shape)


def _head_size(config: Any) -> int:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    size = getattr(config, "head_dim", None)
    if size is None and isinstance(width, int) and isinstance(heads, int) and heads > 0:
        size = width // heads
    if not isinstance(size, int) or size < 2 or size % 2:
        raise LayerMismatchError(
            "The file orders the outputs of attention by heads, and the base model does not say how large they are: its"
            " config needs hidden_size and num_attention_heads, or head_dim."
        )
    return size
