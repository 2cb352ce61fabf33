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

    Example:
        >>> factors = {"lora_A": torch.zeros(8, 64), "lora_B": torch.zeros(32, 8)}
        >>> weights.LayerWeights("lora", {"rank": 8, "alpha": 16.0}, factors)
        LayerWeights('lora', rank=8, alpha=16.0, lora_A (8, 64), lora_B (32, 8))

    Attributes:
        method: The method's key, in lower case: `"lora"`.
        hyperparameters: The method's numbers and options. For `"lora"`: `rank` (int), `alpha` (float),
            `dropout` (float) and `rslora` (bool, the scale is alpha/√rank instead of alpha/rank).
        tensors: The method's own tensors by name, in the shapes of PEFT's files. For `"lora"`, on a Linear
            `lora_A` `(rank, in)` and `lora_B` `(out, rank)`; on a convolution `lora_A` `(rank, in, *kernel)` and
            `lora_B` `(out, rank, 1, ...)`. For `"copy"`, the parameter under its own name, `weight` or another with
            which the path ends, and the buffers of the module.
    """

    method: str
    hyperparameters: Mapping[str, Hyperparameter]
    tensors: Mapping[str, Tensor]

    def __repr__(self) -> str:
        numbers = [f"{name}={value!r}" for name, value in self.hyperparameters.items()]
        shapes = [f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items()]
        return f"LayerWeights({', '.join([repr(self.method), *numbers, *shapes])})"


@dataclass(frozen=True)
class AdapterFile:
    """The content of an adapter file, in the file's own names of layers.

    Example:
        >>> layer = weights.LayerWeights("full", {}, {"diff": torch.zeros(32, 16)})
        >>> weights.AdapterFile({"unet.fc": layer, "unet.out": layer}, components=("unet",))
        AdapterFile(2 layers of full, 1,024 parameters, components=('unet',))

    Attributes:
        layers: Dotted path of each adapted layer in the base model, and its weights. The path of an adapter that is
            for the whole model is empty.
        base_model: The Hub id or path of the base model, where it is known.
        base_structure: A fingerprint of the names and shapes of the base model's weights, where it is known.
        metadata: The string metadata of the safetensors header, without the entry of a format about itself.
        shared: Tensors that all layers share, by name.
        task: The task of the model, in PEFT's words, such as `"CAUSAL_LM"`, where it is known.
        flattened: Whether the paths have `_` in place of every `.`, except after the name of a component.
        components: Names of models, such as those of a pipeline, that paths have in front, where the file says which
            model a layer is of: `"unet"` in `"unet.conv_in"`.
        others: Tensors that are for no layer, such as the embeddings of new tokens, by the names in the file.
        counted: For files that number layers instead of naming them: of each component, the names of the classes whose
            layers are counted, in the order of the model. The path of the first is `"unet.0"`.
        aliases: Other paths that a layer may have in the model, by the path that it has here.
        interleaved: Paths of layers whose outputs a rotary embedding turns by pairs, with both outputs of a pair side
            by side in the file, where the model has them half a head apart.
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

    def __repr__(self) -> str:
        methods = sorted({layer.method for layer in self.layers.values()})
        tensors = [*self.shared.values(), *self.others.values()]
        tensors += [tensor for layer in self.layers.values() for tensor in layer.tensors.values()]
        count = f"{len(self.layers):,} {'layer' if len(self.layers) == 1 else 'layers'}"
        facts = [f"{count} of {', '.join(methods)}" if methods else count]
        facts += [f"{sum(tensor.numel() for tensor in tensors):,} parameters"]
        names = ("base_model", "task", "components", "flattened", "format")
        facts += [f"{name}={value!r}" for name in names if (value := getattr(self, name))]
        return f"AdapterFile({', '.join(facts)})"

    def component_of(self, path: str) -> tuple[str, str]:
        """The component that a path begins with, empty if with none, and the rest of the path."""
        first, _, rest = path.partition(".")
        return (first, rest) if rest and first in self.components else ("", path)

    def part(self, component: str) -> AdapterFile:
        """The layers of one component by their paths inside it, without tensors that are for no layer of any."""
        places = {path: self.component_of(path) for path in self.layers}
        layers = {rest: self.layers[path] for path, (first, rest) in places.items() if first == component}
        counted = {"": self.counted[component]} if component in self.counted else {}
        return replace(self, layers=layers, components=(), counted=counted, others={} if component else self.others)
