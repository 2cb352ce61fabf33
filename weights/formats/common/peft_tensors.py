"""PEFT's tensors and settings together: an adapter from them, and the reverse."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.formats.common import peft_settings, peft_whole
from weights.formats.common.format import refuse
from weights.formats.common.peft_settings import NAME
from weights.methods.core.factors import missing
from weights.methods.core.peft import PREFIX, PeftLayout, peft_layouts


def parse(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: Path, *, front: str = PREFIX
) -> AdapterFile:
    """The adapter that tensors and settings as in PEFT's files say together.

    Args:
        tensors: By their names in PEFT's files.
        settings: The content of the `adapter_config.json`.
        source: The file, for messages.
        front: The start of names in the file that stands for PEFT's prefix, for messages.

    Raises:
        FileFormatError: They contradict each other, or use what is not supported; the message names the source.
    """
    fields, layout = peft_settings.checked(settings, source)
    named, shared, others = _sorted_out(tensors, layout)
    beside, stray = peft_whole.layers(tensors, others, fields, layout.prefix)
    refuse(source, NAME, [f"the key {key!r} is not expected" for key in stray])
    refuse(source, NAME, [] if named or beside else ["it has no adapter in it"])
    names = _name_problems(named, layout, front)
    refuse(source, NAME, [*peft_settings.slow_patterns(fields, layout, named), *names])
    common = peft_settings.hyperparameters(fields, layout)
    layers: dict[str, LayerWeights] = {}
    for where, own in named.items():
        numbers = {**common, **peft_settings.of_layer(fields, layout, where, own)}
        layers[where] = LayerWeights(layout.method, numbers, dict(sorted(own.items())))
    refuse(source, NAME, [*_layer_problems(layers, layout), *_shared_problems(shared, fields, layout)])
    base, task = fields["base_model_name_or_path"] or None, fields["task_type"]
    return AdapterFile({**layers, **beside}, base, {}, shared, task)


def render(adapter: AdapterFile, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings that PEFT needs for an adapter of one model.

    Raises:
        FileFormatError: PEFT cannot hold it; the message names the path, where it was to be written.
    """
    if adapter.flattened:
        refuse(path, NAME, ["the paths of its layers are flattened: load it into the model, and save it from there"])
    layers = {where: layer for where, layer in adapter.layers.items() if layer.method not in peft_whole.METHODS}
    if not layers and {layer.method for layer in adapter.layers.values()} == {"trainable_tokens"}:
        layers = dict(adapter.layers)  # PEFT has a type for this one alone too.
    beside = {where: layer for where, layer in adapter.layers.items() if where not in layers}
    layout = _layout_of(layers, beside, path)
    rows = {where: layer for where, layer in beside.items() if layer.method == "trainable_tokens"}
    for some, its in ((layers, layout), (rows, peft_layouts()["trainable_tokens"])):
        refuse(path, NAME, _name_problems({where: layer.tensors for where, layer in some.items()}, its))
        refuse(path, NAME, _layer_problems(some, its))
    refuse(path, NAME, [f"layer {where!r} has no tensors" for where, layer in beside.items() if not layer.tensors])
    more, settings, unfit = peft_whole.write(beside, layers, layout)
    settings = {**peft_settings.config_of(adapter, layers, layout, path), **settings}
    refuse(path, NAME, [*_shared_problems(adapter.shared, settings, layout), *unfit])
    tensors = {
        layout.key(where, name): layout.written(name, tensor)
        for where, layer in layers.items()
        for name, tensor in layer.tensors.items()
    }
    tensors |= {layout.shared[name]: tensor for name, tensor in adapter.shared.items()}
    return tensors | more, settings


# The names of tensors


def is_key(key: str) -> bool:
    """Whether a key is named as PEFT names tensors."""
    whole = (layout for layout in peft_layouts().values() if layout.whole_model)
    return key.startswith("base_model.") or any(key in layout.ends for layout in whole)


def _sorted_out(
    tensors: Mapping[str, Tensor], layout: PeftLayout
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """The tensors of adapters by layer, those that all layers share, and the other keys."""
    named: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    others: list[str] = []
    for key in tensors:
        where, name = _adapter_key(key, layout) or (None, "")
        if where is None and name:
            shared[name] = tensors[key]
        elif where is None or name in named.get(where, ()):  # Nothing, or an alias of what is there.
            others.append(key)
        else:
            named.setdefault(where, {})[name] = tensors[key]
    return named, shared, others


def _adapter_key(key: str, layout: PeftLayout) -> tuple[str | None, str] | None:
    """The layer and the tensor that a key names; no layer for a shared tensor, which some files have in each layer."""
    for name, whole in layout.shared.items():
        if key == whole or (key.startswith(PREFIX) and key.endswith(whole.removeprefix("base_model"))):
            return None, name
    if layout.whole_model:
        return ("", layout.ends[key]) if key in layout.ends else None
    if key.startswith(PREFIX):
        for end, name in layout.ends.items():
            if key.endswith(end) and key[-len(end) - 1] == ".":
                where = key[len(PREFIX) : -len(end) - 1]
                return peft_whole.place_of(where, name) if layout.parameters else where, name
    return None


def _layout_of(layers: Mapping[str, LayerWeights], beside: Mapping[str, LayerWeights], path: Path) -> PeftLayout:
    """The layout that can hold these layers, of one method; LoRA's where none has an adapter."""
    known = peft_layouts()
    if not layers and beside:
        return known["lora"]
    if not layers:
        refuse(path, NAME, ["it has no layers with an adapter"])
    methods = sorted({layer.method for layer in layers.values()})
    if len(methods) > 1:
        refuse(path, NAME, [f"it has several methods ({', '.join(methods)}), and PEFT keeps one in a file"])
    if methods[0] not in known:
        refuse(path, NAME, [f"it has the method {methods[0]!r}, which is none of {', '.join(known)}"])
    return known[methods[0]]


def _name_problems(
    layers: Mapping[str, Mapping[str, Tensor]], layout: PeftLayout, front: str = PREFIX
) -> Iterator[str]:
    """The problems of layers that lack tensors, or have others."""
    for path, tensors in layers.items():
        absent = layout.absent(tensors)
        if layout.whole_model and path:
            yield f"layer {path!r} has {layout.method}, which is for the whole model"
        elif not tensors or not tensors.keys() <= layout.tensors.keys():
            have = ", ".join(sorted(tensors)) or "nothing"
            yield f"layer {path!r} has {have} instead of {' and '.join(absent or layout.tensors)}"
        elif absent:
            own = next((name for pair in layout.pairs if absent[0] in pair for name in pair if name in tensors), None)
            keys = [layout.key(path, name) for name in (own or min(tensors), *absent)]
            yield missing(*(f"{front}{key.removeprefix(PREFIX)}" if key.startswith(PREFIX) else key for key in keys))
        elif not layout.parameters and not all(tensor.ndim for tensor in tensors.values()):
            yield f"layer {path!r} has a single number in place of a tensor"


def _layer_problems(layers: Mapping[str, LayerWeights], layout: PeftLayout) -> Iterator[str]:
    """The problems of layers with all their tensors."""
    for path, layer in layers.items():
        if problem := layout.check(layer):
            yield f"layer {path!r} has {problem}"


def _shared_problems(shared: Iterable[str], settings: Mapping[str, Any], layout: PeftLayout) -> Iterator[str]:
    """The problems of the names of the tensors that all layers share."""
    for name in sorted(set(shared) - layout.shared.keys()):
        yield f"there is no place for {name!r}, which all layers share"
    if layout.shared_if is None or settings[layout.shared_if]:
        for name in sorted(layout.shared.keys() - set(shared)):
            yield f"the tensor {layout.shared[name]!r} is missing"
