"""What an adapter file says, whatever its grammar: which layers, which method, which numbers, which tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

Hyperparameter = int | float | bool | str | tuple[int, ...] | None


@dataclass(frozen=True)
class LayerWeights:
    """The adapter of one layer.

    Attributes:
        method: The method's key, in lower case: `"lora"`.
        hyperparameters: What the method needs besides its tensors. For `"lora"`: `rank` (int), `alpha` (float),
            `dropout` (float) and `rslora` (bool, the scale is alpha/√rank instead of alpha/rank).
        tensors: The method's own tensors by name, in the shapes of PEFT's files. For `"lora"`, on a Linear
            `lora_A` `(rank, in)` and `lora_B` `(out, rank)`; on a convolution `lora_A` `(rank, in, *kernel)` and
            `lora_B` `(out, rank, 1, ...)`. For `"copy"`, the parameter under its own name, `weight` or another with
            which the path ends, and the buffers of the module.
    """

    method: str
    hyperparameters: Mapping[str, Hyperparameter]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class AdapterFile:
    """An adapter as a file holds it.

    Attributes:
        layers: Dotted path of each adapted layer in the base model, and its weights. A file for several models, such
            as those of a pipeline, has the name of the model in front. The path of an adapter that is for the whole
            model is empty.
        base_model: The Hub id or path of the base model, where it is known.
        metadata: The text metadata of the safetensors header.
        shared: Tensors that all layers have in common, by name.
        task: What the model is for, in PEFT's words, such as `"CAUSAL_LM"`, where it is known.
        flattened: Whether the paths have `_` in place of every `.`, except after the name of a model.
    """

    layers: Mapping[str, LayerWeights]
    base_model: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    task: str | None = None
    flattened: bool = False

    @property
    def components(self) -> list[str]:
        """The first names of the paths: where the file is for several models, their names."""
        return sorted({path.partition(".")[0] for path in self.layers if "." in path})

    def part(self, component: str) -> AdapterFile:
        """What is for one of several models."""
        inside = f"{component}."
        layers = {path.removeprefix(inside): layer for path, layer in self.layers.items() if path.startswith(inside)}
        return replace(self, layers=layers)
