"""The format of Black Forest Labs for the control LoRAs of Flux: one safetensors file, with the names of their model.

Tensors are named `<path>.lora_A.weight`, `<path>.lora_B.weight` and `<path>.lora_B.bias`, and there are the scales of
normalisation layers, whole. The scale is 1. The first layer takes more channels than that of the base model has.
"""

from __future__ import annotations

from dataclasses import replace

from weights.adapter_file import AdapterFile, LayerWeights
from weights.formats import keyed
from weights.formats.found import Found

FILES = ()
NAME = "BFL"

_NORMS = (".query_norm.scale", ".key_norm.scale")


def recognise(found: Found) -> bool:
    """Whether the file has the scale of a normalisation layer beside adapters."""
    return any(key.endswith(_NORMS) for key in found.tensors or ()) and any(found.stems.values())


def read(found: Found) -> AdapterFile:
    """Read a file of Black Forest Labs.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists what is wrong.
    """
    tensors = found.open()
    norms = [key for key in tensors if key.endswith(_NORMS)]
    file = keyed.read(found, str, NAME, own=norms)
    copies = {key: LayerWeights("copy", {}, {key.rpartition(".")[2]: tensors[key]}) for key in norms}
    return replace(file, layers={**file.layers, **copies})
