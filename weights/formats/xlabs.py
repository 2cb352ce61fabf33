"""The format of XLabs-AI for Flux: one safetensors file, with layers named by the processors of the attentions.

Tensors are named `double_blocks.<n>.processor.{qkv,proj}_lora{1,2}.{down,up}.weight`, 1 for the image and 2 for the
text, and `single_blocks.<n>.processor.{qkv,proj}_lora.{down,up}.weight`. The scale is 1.
"""

from __future__ import annotations

import re

from weights.adapter_file import AdapterFile
from weights.formats import keyed
from weights.formats.found import Found

FILES = ()
NAME = "XLabs"

_STEM = re.compile(r"((?:double|single)_blocks\.\d+\.processor\.(?:qkv|proj))([12]?)")


def recognise(found: Found) -> bool:
    """Whether the file has a tensor that is named as XLabs names them."""
    return any(map(where, found.stems))


def where(stem: str) -> str | None:
    """The path of what a key calls a layer."""
    match = _STEM.fullmatch(stem.removeprefix("diffusion_model."))
    return f"{match[1]}_lora{match[2]}" if match else None


def read(found: Found) -> AdapterFile:
    """Read a file of XLabs.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists what is wrong.
    """
    return keyed.read(found, where, NAME)
