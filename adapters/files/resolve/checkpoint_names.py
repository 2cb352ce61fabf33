"""Files with the names of a checkpoint, of which nothing but the names and the shapes of its tensors is known."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

import weights
from adapters.errors import refuse
from adapters.files.resolve.matching import find_layers, places_of
from adapters.files.resolve.original_names import with_names_of
from adapters.targets.target import all_targets


def with_names_in(base: Mapping[str, weights.TensorFiles], file: weights.AdapterFile) -> weights.AdapterFile:
    """A file with the dotted names that its layers have in a base model, whatever it called them before.

    Args:
        base: The tensors of the base model, or of each model of a pipeline by its name, as `weights.open_parts` has
            them. None is read.
        file: What has flattened names, or those of an original model.

    Raises:
        LayerMismatchError: It has layers that the base model does not have; the message lists them.
    """
    renamed, _, problems = names_in(base, file)
    refuse(other_base(file), problems)
    return renamed


def other_base(file: weights.AdapterFile) -> str:
    """What to say first of a file that has layers which a base model does not have."""
    what = "The adapter is for another base model"
    if len(file.components) > 1:
        what += f", or for several: choose one out of {', '.join(file.components)}"
    return what


def names_in(
    base: Mapping[str, weights.TensorFiles], file: weights.AdapterFile
) -> tuple[weights.AdapterFile, dict[str, weights.LayerWeights], list[str]]:
    """The same for the layers that the base model has, those that it does not have, and what is wrong."""
    everything = all_targets(_skeleton(base))
    whole = {"": file.layers[""]} if "" in file.layers else {}  # For the whole model, by whatever names.
    places = places_of(everything, file)
    file, problems = with_names_of(places, file)
    found, missing, more = find_layers(everything, places, file)
    absent = sorted(name for name in missing if name)
    problems += more + [f"there is no layer {name}" for name in absent]
    renamed: dict[str, weights.LayerWeights] = {}
    components: dict[str, None] = {}
    for layer, name in found:
        component = "" if "" not in base else file.component_of(name)[0]
        path = f"{component}.{layer.path}" if component else layer.path
        renamed[path] = file.layers[name]
        components[component or path.partition(".")[0]] = None
    known = (*base,) if "" not in base else file.components
    renamed_file = replace(
        file,
        layers={**whole, **renamed},
        flattened=False,
        components=tuple(name for name in known if name in components),
        aliases={},
    )
    return renamed_file, {name: file.layers[name] for name in absent}, problems


def _skeleton(base: Mapping[str, weights.TensorFiles]) -> nn.Module:
    """A module with the names and the shapes of tensors, and no values. Modules have dotted names in it: it is flat."""
    root = nn.Module()
    for component, tensors in base.items():
        for name, slot in tensors.slots.items():
            path, _, parameter = f"{component}.{name}".removeprefix(".").rpartition(".")
            if path:
                module = root._modules.setdefault(path, nn.Module())
                shape = torch.empty(slot.shape, dtype=slot.dtype, device="meta")
                module._parameters[parameter] = nn.Parameter(shape, requires_grad=False)  # type: ignore[union-attr]
    return root
