"""The methods, one per file: formula, initialisation, names of the tensors."""

from collections.abc import Mapping

from adapters.method import Method
from adapters.methods.boft import BOFT, OutputBOFT
from adapters.methods.c3a import C3A
from adapters.methods.copied import Copy
from adapters.methods.hra import HRA
from adapters.methods.lora import LoRA
from adapters.methods.miss import Bat, MiSS
from adapters.methods.oft import OFT, DiagOFT

METHODS: Mapping[str, type[Method]] = {
    method.key: method
    for method in (
        LoRA,
        Copy,
        OFT,
        DiagOFT,
        BOFT,
        OutputBOFT,
        HRA,
        C3A,
        MiSS,
        Bat,
    )
}
"""Every method by the name that files give it."""

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "METHODS",
    "OFT",
    "Bat",
    "Copy",
    "DiagOFT",
    "LoRA",
    "MiSS",
    "OutputBOFT",
]
