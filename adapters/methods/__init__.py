"""The methods, one per file: formula, initialisation, names of the tensors."""

from collections.abc import Mapping

from adapters.method import Method
from adapters.methods.copied import Copy
from adapters.methods.fourierft import FourierFT
from adapters.methods.gralora import GraLoRA
from adapters.methods.lora import LoRA
from adapters.methods.randlora import RandLoRA
from adapters.methods.shira import SHiRA
from adapters.methods.vblora import VBLoRA
from adapters.methods.vera import VeRA

METHODS: Mapping[str, type[Method]] = {
    method.key: method
    for method in (
        LoRA,
        Copy,
        FourierFT,
        GraLoRA,
        RandLoRA,
        SHiRA,
        VBLoRA,
        VeRA,
    )
}
"""Every method by the name that files give it."""

__all__ = [
    "METHODS",
    "Copy",
    "FourierFT",
    "GraLoRA",
    "LoRA",
    "RandLoRA",
    "SHiRA",
    "VBLoRA",
    "VeRA",
]
