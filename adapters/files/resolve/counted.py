"""Files that number layers instead of naming them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

import weights
from adapters.files.resolve.path_index import NamedWeight
from adapters.layers.matrix import Matrix
from adapters.targets.target import Target
from weights.families import class_names

_BLOCK = re.compile(r"(.*\btransformer_blocks\.\d+)\.(attn2\b)?")


def counted_paths(known: Sequence[NamedWeight], file: weights.AdapterFile) -> dict[str, tuple[str]]:
    """The path of the layer that each number stands for, in those components of which all layers fit.

    A checkpoint does not tell the classes of modules, so that nothing in it can be counted.
    """
    layers = [weight for weight in known if isinstance(weight, Target)]
    found: dict[str, tuple[str]] = {}
    for component, classes in file.counted.items():
        names = [name for name in file.layers if file.component_of(name)[0] == component]
        numbers = {int(name.rpartition(".")[2]): name for name in names}
        inside = [layer for layer in layers if layer.path.startswith(f"{component}.")] or layers
        contents = [file.layers[numbers[number]] for number in sorted(numbers)]
        counted = _counted(inside, classes, any(content.tensors["lora_A"].ndim == 4 for content in contents))
        for order in (counted, _second_attention_last(counted)):
            if [*range(len(order))] == sorted(numbers) and all(map(_fits, order, contents)):
                found |= {numbers[number]: (layer.path,) for number, layer in enumerate(order)}
    return found


def _counted(layers: Sequence[Target], classes: Sequence[str], convolutions: bool) -> list[Target]:
    """The layers that are in a module of one of some classes."""
    known = {name for kind in classes for name in class_names(kind)}
    kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
    modules = [layer for layer in layers if layer.parameter == "weight"]
    holders = {layer.path for layer in modules if type(layer.module).__name__ in known}
    return [layer for layer in modules if isinstance(layer.module, kinds) and not holders.isdisjoint(_above(layer))]


def _above(layer: Target) -> list[str]:
    names = layer.path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def _second_attention_last(layers: Sequence[Target]) -> list[Target]:
    """Layers in the order of older versions of diffusers, whose blocks had the second attention at their end."""
    firsts: dict[str, int] = {}
    order: list[tuple[int, bool, int]] = []
    for number, layer in enumerate(layers):
        block = _BLOCK.match(layer.path)
        order.append(
            (firsts.setdefault(block[1], number), bool(block[2]), number) if block else (number, False, number)
        )
    return [layers[number] for *_, number in sorted(order)]


def _fits(layer: Target, content: weights.LayerWeights) -> bool:
    """Whether two low-rank factors have the shape of a weight."""
    matrix = Matrix.of(layer.module, "weight")
    a, b = content.tensors["lora_A"], content.tensors["lora_B"]
    return matrix is not None and matrix.shape == (b.shape[0], a[0].numel())
