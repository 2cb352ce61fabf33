"""The format of ComfyUI: tensors with dotted names of layers, in one safetensors file.

Written by ComfyUI, ai-toolkit, OneTrainer and the trainers of single models. Tensors are named `<prefix><path>.<end>`,
with the names of the original model and one of several prefixes or none. Without an `alpha` the scale is 1.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from weights.adapter_file import AdapterFile
from weights.formats.common import single_file
from weights.formats.common.format import Format, Match
from weights.formats.common.probe import Probe

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


def recognise(probe: Probe) -> Match:
    """FALLBACK for any file with adapters: there is no mark but the lack of any other."""
    return Match.FALLBACK if any(probe.stems.values()) else Match.NO


def where(stem: str) -> str:
    """The path of a layer, with the component in front, by its name in the keys."""
    for prefix, component in PREFIXES.items():
        if stem.startswith(prefix):
            return ".".join(filter(None, (component, stem.removeprefix(prefix))))
    return _LANGUAGE_MODEL.sub("text_encoder.", stem, count=1) if _LANGUAGE_MODEL.match(stem) else stem


def read(probe: Probe) -> AdapterFile:
    """Read a file.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists the problems.
    """
    return single_file.read(probe, where, NAME, components=_COMPONENTS)


FORMAT = Format(recognise, read)
