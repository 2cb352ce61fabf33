"""The format of LyCORIS and of kohya's training scripts: one safetensors file, with everything in it.

Tensors are named `<prefix>_<path>.<end>`, where the path of the layer is flattened: it has `_` for every `.`, so that
only the names in the model tell where it was one. The prefix says which model is meant, of those that a pipeline is
made of. Beside the tensors of a layer is its `alpha`. What each method calls its tensors is in `lycoris_methods`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.formats import keyed
from weights.formats.found import Found
from weights.formats.keys import ALPHA
from weights.formats.lycoris_methods import GRAMMARS, Grammar, write_none
from weights.tensors.open import save

FILES = ()  # A file of any name: in a repository it might as well be the base model.
METHODS = tuple(dict.fromkeys(grammar.method for grammar in GRAMMARS if grammar.write is not write_none))
NAME = "LyCORIS"

COMPONENTS: Mapping[str, str] = {
    "lycoris": "",
    "lora_unet": "unet",
    "lora_unet_": "unet",  # Of the trainer of Wan Fun.
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
    "lora_prior_unet": "prior",
    "lora_prior_te": "text_encoder",
    "oft_unet": "unet",
}
"""The component of a pipeline that a prefix means."""

_LONGEST_FIRST = sorted(COMPONENTS, key=len, reverse=True)
_CONTROL = "lllite_"

# What transformers calls the layers of CLIP since it has no `text_model` around them any more, which is in files.
_CLIP = ("encoder.layers.", "encoder_layers_", "final_layer_norm", "embeddings")


def recognise(found: Found) -> bool:
    """Whether the file has a tensor that is named as LyCORIS names them."""
    return any(where(stem) is not None for stem in found.stems) or _is_control(found)


def read(found: Found) -> AdapterFile:
    """Read a file of LyCORIS or of kohya's scripts, or one that `write` wrote.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists what is wrong.
    """
    if _is_control(found):
        keyed.refuse(found.path, NAME, ["it is a ControlNet-LLLite: it adds to what layers are given, by an image"])

    def flat(stem: str) -> str | None:  # OneTrainer leaves some names as they were, next to those of their layers.
        return where(stem.replace(".", "_"))

    return keyed.read(found, flat, NAME, components=COMPONENTS.values(), flattened=True)


def _is_control(found: Found) -> bool:
    """Whether it has what kohya's scripts also train and what changes no weights, ControlNet-LLLite."""
    return any(key.startswith(_CONTROL) for key in found.tensors or ())


def where(stem: str) -> str | None:
    """The path of what a key calls a layer, with its component and a dot in front; None if it has no known prefix."""
    if "." in stem:
        return None
    for prefix in _LONGEST_FIRST:
        if stem.startswith(f"{prefix}_"):
            return f"{COMPONENTS[prefix]}.{stem.removeprefix(f'{prefix}_')}".removeprefix(".")
    return None


def write(adapter: AdapterFile, path: Path) -> None:
    """Write a file that LyCORIS loads.

    Args:
        adapter: What to write.
        path: The file, which ends in `.safetensors`.

    Raises:
        FileFormatError: The path is not that of such a file, or the format cannot hold the adapter.
        FileWriteError: The system refused to write.
    """
    problems = ["its name does not end in .safetensors"] if path.suffix != ".safetensors" else []
    problems += [f"it has no place for {name}, which all layers share" for name in adapter.shared]
    places: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for where, layer in adapter.layers.items():
        try:
            written = _write_layer(where, layer, adapter)
        except ValueError as problem:
            problems.append(f"layer {where!r} has {problem}")
            continue
        for key, tensor in written.items():
            tensors[key] = tensor
            if places.setdefault(key, where) != where:
                problems.append(f"{places[key]} and {where} have the same name in it, {key.partition('.')[0]}")
                break
    keyed.refuse(path, NAME, problems or ([] if tensors else ["it has no layers with an adapter"]))
    save(tensors, path, adapter.metadata)


# Layers


def _write_layer(where: str, layer: LayerWeights, adapter: AdapterFile) -> dict[str, Tensor]:
    """The tensors of a layer by their names in a file; raises a ValueError for what there is no place for."""
    grammar = _grammar(layer)
    owner = where.removesuffix("_bias" if adapter.flattened else ".bias")
    if grammar.bias and owner != where and all(tensor.ndim == 1 for tensor in layer.tensors.values()):
        beside = adapter.layers.get(owner)
        if beside is None or beside.method != layer.method:
            raise ValueError(f"a bias without the weight of {owner!r}, which LyCORIS does not read")
        where, tensors = owner, {_grammar(beside).bias[name]: tensor for name, tensor in layer.tensors.items()}
    else:
        grammar.check(layer.tensors)
        tensors, alpha = grammar.write(layer)
        tensors = {grammar.end(name): tensor for name, tensor in tensors.items()}
        tensors |= {} if alpha is None else {ALPHA: _written_alpha(alpha)}
    return {f"{_stem(where, adapter)}.{end}": tensor for end, tensor in tensors.items()}


def _stem(where: str, adapter: AdapterFile) -> str:
    """What all keys of a layer start with; raises a ValueError for a component without a prefix."""
    component, path = adapter.component_of(where)
    prefix = next((prefix for prefix, name in COMPONENTS.items() if name == component), None)
    if prefix is None:
        known = ", ".join(dict.fromkeys(filter(None, COMPONENTS.values())))
        raise ValueError(f"the component {component!r}, which is none of {known}")
    if prefix == "lora_te" and "text_encoder_2" in adapter.components:
        prefix = "lora_te1"
    if component.startswith("text_encoder") and path.startswith(_CLIP):
        path = f"text_model.{path}"
    return f"{prefix}_{path.replace('.', '_')}"


def _grammar(layer: LayerWeights) -> Grammar:
    """That of a layer; raises a ValueError if there is none."""
    if layer.method not in METHODS:
        raise ValueError(f"the method {layer.method!r}, which is none of {', '.join(METHODS)}")
    for grammar in GRAMMARS:
        if grammar.method == layer.method and grammar.fits(layer.tensors):
            return grammar
    raise ValueError(f"{', '.join(sorted(layer.tensors))}, for which there are no names in it")


def _written_alpha(alpha: float) -> Tensor:
    """In single precision, as everyone writes it, unless that would change it."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)
