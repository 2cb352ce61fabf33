"""`AdapterFile`, the content of an adapter file of any format: layers, methods, hyperparameters, tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

CONFIG = "adapter_config.json"
"""The settings beside the tensors of PEFT's files, and of others."""

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
        layers: Dotted path of each adapted layer in the base model, and its weights. The path of an adapter that is
            for the whole model is empty.
        base_model: The Hub id or path of the base model, where it is known.
        base_structure: A fingerprint of the names and shapes of the base model's weights, where it is known.
        metadata: The text metadata of the safetensors header, without what a format says of itself there.
        shared: Tensors that all layers have in common, by name.
        task: What the model is for, in PEFT's words, such as `"CAUSAL_LM"`, where it is known.
        flattened: Whether the paths have `_` in place of every `.`, except after the name of a component.
        components: Names of models, such as those of a pipeline, that paths have in front, where the file says which
            model a layer is of: `"unet"` in `"unet.conv_in"`.
        others: Tensors that are for no layer, such as the embeddings of new tokens, by the names in the file.
        counted: For files that number layers instead of naming them: of each component, the names of the classes whose
            layers are counted, in the order of the model. The path of the first is `"unet.0"`.
        aliases: Other paths that a layer may have in the model, by the path that it has here.
        interleaved: Paths of layers whose outputs are turned by pairs for their positions (RoPE), with both numbers of
            a pair side by side in the file, where the model has them half a head apart.
        format: The name of the format that it was read in.
    """

    layers: Mapping[str, LayerWeights]
    base_model: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    task: str | None = None
    flattened: bool = False
    components: tuple[str, ...] = ()
    others: Mapping[str, Tensor] = field(default_factory=dict)
    base_structure: str | None = None
    counted: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    interleaved: frozenset[str] = frozenset()
    format: str | None = None

    def component_of(self, path: str) -> tuple[str, str]:
        """The component that a path begins with, empty if with none, and the rest of the path."""
        first, _, rest = path.partition(".")
        return (first, rest) if rest and first in self.components else ("", path)

    def part(self, component: str) -> AdapterFile:
        """What is for one component, with the paths inside it, and without what is for no layer of any."""
        places = {path: self.component_of(path) for path in self.layers}
        layers = {rest: self.layers[path] for path, (first, rest) in places.items() if first == component}
        counted = {"": self.counted[component]} if component in self.counted else {}
        return replace(self, layers=layers, components=(), counted=counted, others={} if component else self.others)
