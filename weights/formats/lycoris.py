"""The format of LyCORIS and of kohya's training scripts: one safetensors file, with everything in it.

Tensors are named `<prefix>_<path>.<end>`, where the path of the layer is flattened: it has `_` for every `.`, so that
only the names in the model tell where it was one. The prefix says which model is meant, of those that a pipeline is
made of. Beside the tensors of a layer is its `alpha`. The names of each method's tensors are in `weights.methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.formats.common import single_file
from weights.formats.common.format import Format, Match, refuse
from weights.formats.common.key_ends import ALPHA
from weights.formats.common.probe import Probe
from weights.methods.core.lycoris import LycorisLayout, Written, lycoris_layouts
from weights.tensors.open import save

METHODS = frozenset(layout.method for layout in lycoris_layouts() if layout.write is not None)
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

# The names of CLIP's layers in transformers, which has no `text_model` around them any more, as files have.
_CLIP = ("encoder.layers.", "encoder_layers_", "final_layer_norm", "embeddings")


def recognise(probe: Probe) -> Match:
    """SURE of a file with a layer that is named as LyCORIS names them."""
    return Match.sure_if(any(where(stem) is not None for stem in probe.stems) or _is_control(probe))


def read(probe: Probe) -> AdapterFile:
    """Read a file of LyCORIS or of kohya's scripts, or one that `write` wrote.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists the problems.
    """
    if _is_control(probe):
        refuse(probe.path, NAME, ["it is a ControlNet-LLLite: it adds to what layers are given, by an image"])

    def flat(stem: str) -> str | None:  # OneTrainer leaves some names as they were, next to those of their layers.
        return where(stem.replace(".", "_"))

    return single_file.read(probe, flat, NAME, components=COMPONENTS.values(), flattened=True)


def _is_control(probe: Probe) -> bool:
    """Whether it has a ControlNet-LLLite, which kohya's scripts also train and which changes no weights."""
    return any(key.startswith(_CONTROL) for key in probe.tensors or ())


def where(stem: str) -> str | None:
    """The path of a layer by its name in the keys, with `component.` in front; None for one without a known prefix."""
    if "." in stem:
        return None
    for prefix in _LONGEST_FIRST:
        if stem.startswith(f"{prefix}_"):
            return f"{COMPONENTS[prefix]}.{stem.removeprefix(f'{prefix}_')}".removeprefix(".")
    return None


def write(adapter: AdapterFile, path: Path) -> None:
    """Write a file that LyCORIS loads.

    Args:
        adapter: The adapter.
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
    refuse(path, NAME, problems or ([] if tensors else ["it has no layers with an adapter"]))
    save(tensors, path, adapter.metadata)


# Layers


def _write_layer(where: str, layer: LayerWeights, adapter: AdapterFile) -> dict[str, Tensor]:
    """The tensors of a layer by their names in a file; raises a ValueError for what there is no place for."""
    layout, written = _layout(layer)
    owner = where.removesuffix("_bias" if adapter.flattened else ".bias")
    if layout.bias and owner != where and all(tensor.ndim == 1 for tensor in layer.tensors.values()):
        beside = adapter.layers.get(owner)
        if beside is None or beside.method != layer.method:
            raise ValueError(f"a bias without the weight of {owner!r}, which LyCORIS does not read")
        where, tensors = owner, {_layout(beside)[0].bias[name]: tensor for name, tensor in layer.tensors.items()}
    else:
        layout.check(layer.tensors)
        tensors, alpha = written(layer)
        tensors = {layout.end(name): tensor for name, tensor in tensors.items()}
        tensors |= {} if alpha is None else {ALPHA: _written_alpha(alpha)}
    return {f"{_stem(where, adapter)}.{end}": tensor for end, tensor in tensors.items()}


def _stem(where: str, adapter: AdapterFile) -> str:
    """The start of all keys of a layer; raises a ValueError for a component without a prefix."""
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


def _layout(layer: LayerWeights) -> tuple[LycorisLayout, Callable[[LayerWeights], Written]]:
    """The layout of a layer and its writer; raises a ValueError where it has none."""
    if layer.method not in METHODS:
        raise ValueError(f"the method {layer.method!r}, which is none of {', '.join(sorted(METHODS))}")
    names = ", ".join(sorted(layer.tensors))
    for layout in lycoris_layouts():
        if layout.method == layer.method and layout.fits(layer.tensors):
            if layout.write is None:
                raise ValueError(f"{names}, which LyCORIS does not read")
            return layout, layout.write
    raise ValueError(f"{names}, for which there are no names in it")


def _written_alpha(alpha: float) -> Tensor:
    """The alpha in single precision, as everyone writes it, unless that would change it."""
    single = torch.tensor(alpha, dtype=torch.float32)
    return single if single.item() == alpha else torch.tensor(alpha, dtype=torch.float64)


# A file of any name: in a repository it might as well be the base model.
FORMAT = Format(recognise, read, write, METHODS, aliases=("kohya",))
