"""The layers that the names in a file mean."""

from __future__ import annotations

from collections.abc import Sequence

import weights
from adapters.targets import Layer

# What a component may be called in a pipeline, where a file goes by another.
_ALSO = {
    "unet": ("transformer", "prior"),
    "clip_l": ("text_encoder",),
    "clip_g": ("text_encoder_2",),
    "t5xxl": ("text_encoder_3", "text_encoder_2", "text_encoder"),
}


def find_layers(
    layers: Sequence[Layer], file: weights.AdapterFile
) -> tuple[list[tuple[Layer, str]], list[str], list[str]]:
    """Those of the layers of a model that a file is for.

    A flattened name does not say which `_` was a `.`. So it is the names of the model that are flattened and compared,
    with the component in front for a model that has it by that name, or else without.

    Returns:
        The layers with their names in the file, in the order of the model; the names that are not found; and what is
        wrong with the others.
    """
    places: dict[str, dict[int, Layer]] = {}
    for number, layer in enumerate(layers):
        for path in layer.paths:
            places.setdefault(flat(path) if file.flattened else path, {})[number] = layer
    found: dict[int, list[str]] = {}
    missing: list[str] = []
    problems: list[str] = []
    for name in file.layers:
        candidates = spellings(name, file)
        at = next((places[spelling] for spelling in candidates if spelling in places), {})
        if len(at) > 1:
            problems.append(f"{name} may be {' or '.join(layer.path for layer in at.values())}")
        elif not at:
            missing.append(name)
        else:
            found.setdefault(next(iter(at)), []).append(name)
    for number, names in found.items():
        if len(names) > 1:
            problems.append(f"{' and '.join(names)} are both for {layers[number].path}")
    return [(layers[number], names[0]) for number, names in sorted(found.items())], missing, problems


def spellings(name: str, file: weights.AdapterFile) -> Sequence[str]:
    """What a layer may be called in the model: with its component, in one that has several, or without."""
    component, inside = file.component_of(name)
    names = [name, *(f"{other}.{inside}" for other in _ALSO.get(component, ())), inside]
    return [flat(name) for name in names] if file.flattened else names


def flat(path: str) -> str:
    return path.replace(".", "_")
