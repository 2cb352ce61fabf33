"""The layers that the names in a file mean."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from torch import nn

import weights
from adapters.layers.matrix import Matrix
from adapters.targets.target import Target

# What a component may be called in a pipeline, where a file goes by another.
_ALSO = {
    "unet": ("transformer", "prior"),
    "text_encoder_3": ("text_encoder_2",),  # T5, the third for kohya's scripts also where there are two.
    "clip_l": ("text_encoder",),
    "clip_g": ("text_encoder_2",),
    "t5xxl": ("text_encoder_3", "text_encoder_2", "text_encoder"),
}
# What classes whose layers files count have been called in other versions of diffusers and transformers.
_RENAMED = {"CrossAttention": ("Attention",), "CLIPAttention": ("CLIPSdpaAttention", "CLIPFlashAttention2")}
_BLOCK = re.compile(r"(.*\btransformer_blocks\.\d+)\.(attn2\b)?")


Places = Mapping[str, Sequence[Target]]
"""The layers of a model by their paths, as a file spells these: flattened ones may be those of several."""


def places_of(layers: Sequence[Target], file: weights.AdapterFile) -> Places:
    """Where the layers of a model are."""
    places: dict[str, list[Target]] = {}
    for layer in layers:
        for path in layer.paths:
            there = places.setdefault(flat(path) if file.flattened else path, [])
            if layer not in there:
                there.append(layer)
    return places


def find_layers(
    layers: Sequence[Target], places: Places, file: weights.AdapterFile
) -> tuple[list[tuple[Target, str]], list[str], list[str]]:
    """Those of the layers of a model that a file is for.

    A flattened name does not say which `_` was a `.`. So it is the names of the model that are flattened and compared,
    with the component in front for a model that has it by that name, or else without. A number stands for the layer
    that is counted to it.

    Returns:
        The layers with their names in the file, in the order of the model; the names that are not found; and what is
        wrong with the others.
    """
    found: dict[Target, list[str]] = {}
    missing: list[str] = []
    problems: list[str] = []
    numbered = _numbered(layers, file)
    for name in file.layers:
        candidates = numbered.get(name, ()) if file.counted else spellings(name, file)
        at = next((places[spelling] for spelling in candidates if spelling in places), ())
        if len(at) > 1:
            problems.append(f"{name} may be {' or '.join(layer.path for layer in at)}")
        elif not at:
            missing.append(name)
        else:
            found.setdefault(at[0], []).append(name)
    for layer, names in found.items():
        if len(names) > 1:
            problems.append(f"{' and '.join(names)} are both for {layer.path}")
    return [(layer, found[layer][0]) for layer in layers if layer in found], missing, problems


def spellings(name: str, file: weights.AdapterFile) -> Sequence[str]:
    """What a layer may be called in the model: with its component, in one that has several, or without."""
    component, inside = file.component_of(name)
    names = [name, *(f"{other}.{inside}" for other in _ALSO.get(component, ())), inside, *file.aliases.get(name, ())]
    return [flat(name) for name in names] if file.flattened else names


def flat(path: str) -> str:
    return path.replace(".", "_")


# Layers that are counted


def _numbered(layers: Sequence[Target], file: weights.AdapterFile) -> dict[str, tuple[str]]:
    """The path of the layer that each name in a file with numbers means, for components of which all layers fit."""
    found: dict[str, tuple[str]] = {}
    for component, classes in file.counted.items():
        names = [name for name in file.layers if file.component_of(name)[0] == component]
        numbers = {int(name.rpartition(".")[2]): name for name in names}
        inside = [layer for layer in layers if layer.path.startswith(f"{component}.")] or layers
        contents = [file.layers[numbers[number]] for number in sorted(numbers)]
        counted = _counted(inside, classes, any(content.tensors["lora_A"].ndim == 4 for content in contents))
        for order in (counted, _of_old(counted)):
            if [*range(len(order))] == sorted(numbers) and all(map(_fits, order, contents)):
                found |= {numbers[number]: (layer.path,) for number, layer in enumerate(order)}
    return found


def _counted(layers: Sequence[Target], classes: Sequence[str], convolutions: bool) -> list[Target]:
    """The layers that are in a module of one of some classes."""
    known = {name for kind in classes for name in (kind, *_RENAMED.get(kind, ()))}
    kinds = (nn.Linear, nn.Conv2d) if convolutions else (nn.Linear,)
    modules = [layer for layer in layers if layer.parameter == "weight"]
    holders = {layer.path for layer in modules if type(layer.module).__name__ in known}
    return [layer for layer in modules if isinstance(layer.module, kinds) and not holders.isdisjoint(_above(layer))]


def _above(layer: Target) -> list[str]:
    names = layer.path.split(".")
    return [".".join(names[:count]) for count in range(1, len(names))]


def _of_old(layers: Sequence[Target]) -> list[Target]:
    """As older versions of diffusers had them: in each block, the second attention came last."""
    firsts: dict[str, int] = {}
    places: list[tuple[int, bool, int]] = []
    for number, layer in enumerate(layers):
        block = _BLOCK.match(layer.path)
        places.append(
            (firsts.setdefault(block[1], number), bool(block[2]), number) if block else (number, False, number)
        )
    return [layers[number] for *_, number in sorted(places)]


def _fits(layer: Target, content: weights.LayerWeights) -> bool:
    """Whether factors are for a weight of this shape."""
    matrix = Matrix.of(layer.module, "weight")
    a, b = content.tensors["lora_A"], content.tensors["lora_B"]
    return matrix is not None and matrix.shape == (b.shape[0], a[0].numel())
