"""The format of XLabs-AI for Flux: one safetensors file, with layers named by the processors of the attentions.

Tensors are named `double_blocks.<n>.processor.{qkv,proj}_lora{1,2}.{down,up}.weight`, 1 for the image and 2 for the
text, and `single_blocks.<n>.processor.{qkv,proj}_lora.{down,up}.weight`. The scale is 1.
"""

from __future__ import annotations

import re

from weights.adapter_file import AdapterFile
from weights.formats.common import single_file
from weights.formats.common.format import Format, Match
from weights.formats.common.probe import Probe

NAME = "XLabs"

_STEM = re.compile(r"((?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj))([12]?)")


def recognise(probe: Probe) -> Match:
    """SURE of a file with a layer that is named as XLabs names them."""
    return Match.sure_if(any(map(where, probe.stems)))


def where(stem: str) -> str | None:
    """The path of a layer by its name in the keys, None for a name of another kind."""
    match = _STEM.fullmatch(stem.removeprefix("diffusion_model."))
    return f"{match[1]}_lora{match[2]}" if match else None


def read(probe: Probe) -> AdapterFile:
    """Read a file of XLabs.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists the problems.
    """
    return single_file.read(probe, where, NAME)


FORMAT = Format(recognise, read)
