"""The format of diffusers: one safetensors file for all models of a pipeline, `pytorch_lora_weights.safetensors`.

Tensors are named `<component>.<path>.<end>`. Newer files have the settings of PEFT in the header's metadata, as JSON
under `lora_adapter_metadata`, each with the component in front; without them the scale is 1, unless a layer has an
`alpha`. Older ones name the layers of an attention by its processor, `<path>.processor.to_q_lora.up.weight`.
Format: https://huggingface.co/docs/diffusers/tutorials/using_peft_for_inference.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.formats.common import peft_tensors, single_file
from weights.formats.common.format import Format, Match, refuse
from weights.formats.common.probe import Probe
from weights.formats.common.settings import without
from weights.formats.common.writing import write_file
from weights.methods.core.peft import PREFIX
from weights.tensors.open import encode

TENSORS = "pytorch_lora_weights.safetensors"
METHODS = frozenset({"lora", "dora"})
NAME = "diffusers"
COMPONENTS = ("unet", "transformer", "transformer_2", "prior", "text_encoder", "text_encoder_2", "text_encoder_3")

_ENTRY = "lora_adapter_metadata"
_PROCESSOR = ".processor."
# The names of layers for which the processor had other names.
_OF_PROCESSOR = {"to_out": "to_out.0"}
_OF_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def recognise(probe: Probe) -> Match:
    """SURE of a file with a layer that is named as diffusers names them, or with its metadata."""
    if probe.tensors is not None and _ENTRY in probe.tensors.metadata:
        return Match.SURE
    return Match.sure_if(any(is_adapter and where(stem) is not None for stem, is_adapter in probe.stems.items()))


def where(stem: str) -> str | None:
    """The path of a layer by its name in the keys, with the component in front, None where that is not known."""
    component, _, path = stem.partition(".")
    if path.startswith(PREFIX):  # diffusers leaves it out.
        return None
    if component not in COMPONENTS:
        component, path = ("", stem) if _PROCESSOR in stem and ".to_" in stem else ("", "")
    renamed = _OF_TEXT if component.startswith("text_encoder") else _OF_PROCESSOR if _PROCESSOR in path else {}
    parent, _, name = path.replace(_PROCESSOR, ".").rpartition(".")
    return ".".join(filter(None, (component, parent, renamed.get(name, name)))) or None if path else None


def read(probe: Probe) -> AdapterFile:
    """Read a file of any version of diffusers, or one that `write` wrote.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists the problems.
    """
    file = probe.open()
    settings = _settings(probe, file.metadata.get(_ENTRY))
    layers: dict[str, LayerWeights] = {}
    told: set[str] = set()
    for component, table in settings.items():
        keys = {key: rest for key in file if (rest := _inside(key, component, settings)) is not None}
        keys = {key: rest for key, rest in keys.items() if not single_file.is_other(key)}
        tensors = {f"{PREFIX}{rest}": file[key] for key, rest in keys.items()}
        part = peft_tensors.parse(
            tensors, {"peft_type": "LORA", **table}, probe.path, front=f"{component}." if component else ""
        )
        layers |= {".".join(filter(None, (component, path))): layer for path, layer in part.layers.items()}
        told |= keys.keys()
    plain = single_file.read(probe, where, NAME, components=COMPONENTS, own=told)
    components = {path.partition(".")[0] for path in layers}.intersection(COMPONENTS).union(plain.components)
    return replace(
        plain,
        layers={**layers, **plain.layers},
        metadata=without(file.metadata, _ENTRY),
        components=tuple(sorted(components)),
    )


def write(adapter: AdapterFile, path: Path) -> None:
    """Write a file that diffusers loads, or a folder with it and a model card, unless there is a `README.md` already.

    Raises:
        FileFormatError: The format cannot hold the adapter.
        FileWriteError: The system refused to write.
    """
    parts = {adapter.component_of(where)[0]: None for where in adapter.layers} or {"": None}
    methods = {layer.method for layer in adapter.layers.values()} - METHODS
    problems = [f"it has {method!r}, which is none of lora and dora" for method in sorted(methods)]
    problems += [f"it has the component {part!r}, of no pipeline" for part in parts if part not in ("", *COMPONENTS)]
    refuse(path, NAME, problems)
    tensors: dict[str, Tensor] = {}
    table: dict[str, Any] = {}
    for component in parts:
        named, settings = peft_tensors.render(adapter.part(component), path)
        front = f"{component}." if component else ""
        tensors |= {f"{front}{key.removeprefix(PREFIX)}": tensor for key, tensor in named.items()}
        table |= {f"{front}{name}": value for name, value in settings.items()}
    metadata = {"format": "pt", _ENTRY: json.dumps(table, indent=2, sort_keys=True)}
    encoded = encode(tensors, metadata)
    write_file(path, TENSORS, encoded, adapter, "diffusers")


def _inside(key: str, component: str, settings: Mapping[str, Any]) -> str | None:
    """The key without its component, or None if it is of another."""
    first, _, rest = key.partition(".")
    if component:
        return rest if first == component else None
    return None if first in settings else key


def _settings(probe: Probe, text: str | None) -> dict[str, dict[str, Any]]:
    """The settings in the metadata, by component."""
    try:
        table = json.loads(text or "{}")
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        refuse(probe.path, NAME, [f"its {_ENTRY} is no table in JSON"])
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in table.items():
        first, _, rest = key.partition(".")
        component, name = (first, rest) if first in COMPONENTS else ("", key)
        by_component.setdefault(component, {})[name] = value
    return by_component


FORMAT = Format(recognise, read, write, METHODS, files=(TENSORS,))
