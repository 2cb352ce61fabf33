"""What an adapter file says, whatever its grammar: which layers, which method, which numbers, which tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

Hyperparameter = int | float | bool | str | None


@dataclass(frozen=True)
class LayerWeights:
    """The adapter of one layer.

    Attributes:
        method: The method's key, in lower case: `"lora"`.
        hyperparameters: What the method needs besides its tensors. For `"lora"`: `rank` (int), `alpha` (float),
            `dropout` (float) and `rslora` (bool, the scale is alpha/√rank instead of alpha/rank).
        tensors: The method's own tensors by name, in the shapes of PEFT's files. For `"lora"`, on a Linear
            `lora_A` `(rank, in)` and `lora_B` `(out, rank)`; on a convolution `lora_A` `(rank, in, *kernel)` and
            `lora_B` `(out, rank, 1, ...)`.
    """

    method: str
    hyperparameters: Mapping[str, Hyperparameter]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as a file holds it.

    Attributes:
        layers: Dotted path of each adapted layer in the base model, and its weights. The path of an adapter that is for
            the whole model is empty.
        base_model: The Hub id or path of the base model, where it is known.
        metadata: The text metadata of the safetensors header.
        shared: Tensors that all layers have in common, by name.
        task: What the model is for, in PEFT's words, such as `"CAUSAL_LM"`, where it is known.
    """

    layers: Mapping[str, LayerWeights]
    base_model: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    task: str | None = None
