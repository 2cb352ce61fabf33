"""What ComfyUI reads beyond the files of others: tensors with dotted names of layers, in one safetensors file.

Written by ComfyUI, ai-toolkit, OneTrainer and the trainers of single models. Tensors are named `<prefix><path>.<end>`,
with the names of the original model and one of several prefixes or none. Without an `alpha` the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from weights.adapter_file import AdapterFile
from weights.formats import bfl, diffusers, keyed, lycoris, native, peft, torchtune, xlabs
from weights.formats.found import Found

FILES = ()
NAME = "ComfyUI"

PREFIXES: Mapping[str, str] = {
    "diffusion_model.": "unet",
    "model.diffusion_model.": "unet",
    "unet.base_model.model.": "unet",
    "base_model.model.": "",
    "text_encoders.clip_l.transformer.": "clip_l",
    "text_encoders.clip_g.transformer.": "clip_g",
    "text_encoders.t5xxl.transformer.": "t5xxl",
    "clip_l.": "clip_l",
    "clip_g.": "clip_g",
    "t5xxl.": "t5xxl",
}
"""The component that a prefix means, in ComfyUI's words for the text encoders."""

_LANGUAGE_MODEL = re.compile(r"text_encoders\.\w+\.transformer\.")  # There is one of them, if any.
_COMPONENTS = {*PREFIXES.values(), "text_encoder"}


def recognise(found: Found) -> bool:
    """Whether the file has adapters with dotted names of layers, and no other format has these names."""
    others = (bfl, diffusers, lycoris, native, torchtune, xlabs)
    if (found.file and found.file.name == peft.TENSORS) or any(other.recognise(found) for other in others):
        return False
    return any(found.stems.values())


def where(stem: str) -> str:
    """The path, with the component in front, of what a key calls a layer."""
    for prefix, component in PREFIXES.items():
        if stem.startswith(prefix):
            return ".".join(filter(None, (component, stem.removeprefix(prefix))))
    return _LANGUAGE_MODEL.sub("text_encoder.", stem, count=1) if _LANGUAGE_MODEL.match(stem) else stem


def read(found: Found) -> AdapterFile:
    """Read a file.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists what is wrong.
    """
    return keyed.read(found, where, NAME, components=_COMPONENTS)
