"""The format of LyCORIS and of kohya's training scripts: one safetensors file, with everything in it.

Tensors are named `<prefix>_<path>.<end>`, where the path of the layer is flattened: it has `_` for every `.`, so that
only the names in the model tell where it was one. The prefix says which model is meant, of those that a pipeline is
made of. Beside the tensors of a layer is its `alpha`. What each method calls its tensors is in `lycoris_methods`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.errors import FileFormatError
from weights.files import open_tensors, save
from weights.formats.lycoris_methods import GRAMMARS, Grammar

FILES = ()  # A file of any name: in a repository it might as well be the base model.
METHODS = frozenset(grammar.method for grammar in GRAMMARS)

COMPONENTS: Mapping[str, str] = {
    "lycoris": "",
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
}
"""The component of a pipeline that a prefix means."""

_ALPHA = "alpha"
_BIASES = {end: grammar.end(name) for grammar in GRAMMARS for name, end in grammar.bias.items()}
_ENDS = {_ALPHA, *_BIASES, *(end for grammar in GRAMMARS for end in grammar.ends)}


def recognise(path: Path) -> bool:
    """Whether `path` is a safetensors file with a tensor that is named as LyCORIS names them."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    return any(_split(key) is not None and key.partition(".")[2] in _ENDS for key in open_tensors(path))


def read(path: Path) -> AdapterFile:
    """Read a file of LyCORIS or of kohya's scripts, or one that `write` wrote.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists what is wrong.
    """
    file = open_tensors(path)
    named: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key in file:
        where, end = _split(key), key.partition(".")[2]
        if where is None:
            problems.append(f"the key {key!r} is not expected")
        elif end in _BIASES:  # A bias is a layer of its own here.
            named.setdefault(f"{where}_bias", {})[_BIASES[end]] = file[key]
        else:
            named.setdefault(where, {})[end] = file[key]
    layers: dict[str, LayerWeights] = {}
    for where, tensors in named.items():
        try:
            layers[where] = _read_layer(tensors)
        except ValueError as problem:
            problems.append(f"layer {where!r} has {problem}")
    _refuse(path, problems)
    return AdapterFile(layers, metadata=file.metadata, flattened=True)


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
    _refuse(path, problems or ([] if tensors else ["it has no layers with an adapter"]))
    save(tensors, path, adapter.metadata)


# The names of layers


def _split(key: str) -> str | None:
    """The layer that a key names, with its component and a dot in front; None for a key of another kind."""
    stem, _, end = key.partition(".")
    for prefix, component in COMPONENTS.items():
        if end and stem.startswith(f"{prefix}_"):
            return f"{component}.{stem.removeprefix(f'{prefix}_')}".removeprefix(".")
    return None


def _stem(where: str, adapter: AdapterFile) -> str:
    """What all keys of a layer start with; raises a ValueError for a part of no pipeline."""
    if not adapter.flattened:
        return f"lycoris_{where.replace('.', '_')}"
    component, _, path = where.rpartition(".")
    several = any(other.startswith("text_encoder_2.") for other in adapter.layers)
    prefix = next((prefix for prefix, name in COMPONENTS.items() if name == component), None)
    if prefix is None:
        raise ValueError(f"the part {component!r}, which is none of {', '.join(filter(None, COMPONENTS.values()))}")
    return f"{'lora_te1' if prefix == 'lora_te' and several else prefix}_{path}"


# Layers


def _read_layer(found: Mapping[str, Tensor]) -> LayerWeights:
    """What the tensors of a layer mean, by the ends of their names; raises a ValueError that says what is wrong."""
    for grammar in GRAMMARS:
        tensors = {grammar.ends.get(end, end): found[end] for end in sorted(found.keys() - {_ALPHA})}
        if grammar.fits(tensors) and (grammar.has_alpha or _ALPHA not in found):
            break
    else:
        raise ValueError(f"{', '.join(sorted(found))}, which is no method that is known here")
    grammar.check(tensors)
    hyperparameters, tensors = grammar.read(tensors, _read_alpha(found.get(_ALPHA)))
    return LayerWeights(grammar.method, hyperparameters, tensors)


def _read_alpha(alpha: Tensor | None) -> float | None:
    if alpha is None:
        return None
    if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha.item()):
        raise ValueError("an alpha that is not a number")
    return float(alpha.item())


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
        tensors |= {} if alpha is None else {_ALPHA: _written_alpha(alpha)}
    return {f"{_stem(where, adapter)}.{end}": tensor for end, tensor in tensors.items()}


def _grammar(layer: LayerWeights) -> Grammar:
    """That of a layer; raises a ValueError if there is none."""
    of_method = [grammar for grammar in GRAMMARS if grammar.method == layer.method]
    if not of_method:
        known = ", ".join(dict.fromkeys(grammar.method for grammar in GRAMMARS))
        raise ValueError(f"the method {layer.method!r}, which is none of {known}")
    for grammar in of_method:
        if grammar.fits(layer.tensors):
            return grammar
    raise ValueError(f"{', '.join(sorted(layer.tensors))}, for which there are no names in it")


def _written_alpha(alpha: float) -> Tensor:
    """In single precision, as everyone writes it, unless that would change it."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


def _refuse(path: Path, problems: list[str]) -> None:
    """Raise one FileFormatError for all problems, if there are any."""
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise FileFormatError(f"{path} does not work as a LyCORIS file: {'; '.join(problems[:5])}{more}.")
