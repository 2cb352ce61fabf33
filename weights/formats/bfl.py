"""The format of Black Forest Labs for the control LoRAs of Flux: one safetensors file, with the names of their model.

Tensors are named `<path>.lora_A.weight`, `<path>.lora_B.weight` and `<path>.lora_B.bias`, and there are the scales of
normalisation layers, whole. The scale is 1. The first layer takes more channels than that of the base model has.
"""

from __future__ import annotations

from dataclasses import replace

from weights.adapter_file import AdapterFile, LayerWeights
from weights.formats.common import single_file
from weights.formats.common.format import Format, Match
from weights.formats.common.probe import Probe

NAME = "BFL"

_NORMS = (".query_norm.scale", ".key_norm.scale")


def recognise(probe: Probe) -> Match:
    """SURE of a file that has the scale of a normalisation layer beside adapters."""
    return Match.sure_if(any(key.endswith(_NORMS) for key in probe.tensors or ()) and any(probe.stems.values()))


def read(probe: Probe) -> AdapterFile:
    """Read a file of Black Forest Labs.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists the problems.
    """
    tensors = probe.open()
    norms = [key for key in tensors if key.endswith(_NORMS)]
    file = single_file.read(probe, str, NAME, own=norms)
    copies = {key: LayerWeights("copy", {}, {key.rpartition(".")[2]: tensors[key]}) for key in norms}
    return replace(file, layers={**file.layers, **copies})


FORMAT = Format(recognise, read)
