"""The methods, one per file: formula, initialisation, names of the tensors."""

from collections.abc import Mapping

from adapters.method import Method
from adapters.methods.copied import Copy
from adapters.methods.delora import DeLoRA
from adapters.methods.glora import GLoRA
from adapters.methods.hira import HiRA
from adapters.methods.ia3 import IA3
from adapters.methods.lora import LoRA
from adapters.methods.lycoris_glora import LycorisGLoRA
from adapters.methods.road import RoAd

METHODS: Mapping[str, type[Method]] = {
    method.key: method
    for method in (
        LoRA,
        Copy,
        DeLoRA,
        GLoRA,
        HiRA,
        IA3,
        LycorisGLoRA,
        RoAd,
    )
}
"""Every method by the name that files give it."""

__all__ = [
    "IA3",
    "METHODS",
    "Copy",
    "DeLoRA",
    "GLoRA",
    "HiRA",
    "LoRA",
    "LycorisGLoRA",
    "RoAd",
]
