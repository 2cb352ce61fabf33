"""The methods, one per file: formula, initialisation, names of the tensors."""

from typing import TypeVar

from adapters.errors import AdapterError
from adapters.method import Method
from adapters.methods.adalora import AdaLoRA
from adapters.methods.bitfit import BitFit
from adapters.methods.boft import BOFT, OutputBOFT
from adapters.methods.bottleneck import Bottleneck
from adapters.methods.c3a import C3A
from adapters.methods.copied import Copy
from adapters.methods.delora import DeLoRA
from adapters.methods.dora import DoRA
from adapters.methods.fourierft import FourierFT
from adapters.methods.full import Full
from adapters.methods.glora import GLoRA
from adapters.methods.gralora import GraLoRA
from adapters.methods.hira import HiRA
from adapters.methods.hra import HRA
from adapters.methods.ia3 import IA3
from adapters.methods.loha import DoHa, LoHa
from adapters.methods.lokr import DoKr, LoKr
from adapters.methods.lora import LoRA
from adapters.methods.lycoris_glora import LycorisGLoRA
from adapters.methods.miss import Bat, MiSS
from adapters.methods.norm import NormTuning
from adapters.methods.oft import OFT, DiagOFT
from adapters.methods.prefix import PrefixTuning
from adapters.methods.prompt import PromptTuning
from adapters.methods.randlora import RandLoRA
from adapters.methods.road import RoAd
from adapters.methods.shira import SHiRA
from adapters.methods.tokens import TrainableTokens
from adapters.methods.vblora import VBLoRA
from adapters.methods.vera import VeRA

METHODS: dict[str, type[Method]] = {
    method.key: method
    for method in (
        AdaLoRA,
        Bat,
        BitFit,
        BOFT,
        Bottleneck,
        C3A,
        Copy,
        DeLoRA,
        DiagOFT,
        DoHa,
        DoKr,
        DoRA,
        FourierFT,
        Full,
        GLoRA,
        GraLoRA,
        HiRA,
        HRA,
        IA3,
        LoHa,
        LoKr,
        LoRA,
        LycorisGLoRA,
        MiSS,
        NormTuning,
        OFT,
        OutputBOFT,
        PrefixTuning,
        PromptTuning,
        RandLoRA,
        RoAd,
        SHiRA,
        TrainableTokens,
        VBLoRA,
        VeRA,
    )
}
"""Every method by the name that files give it."""

M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Make a method of your own known by its `key`, so that files that have it load. To be used as a decorator.

    Raises:
        AdapterError: Another method has that key.
    """
    if METHODS.get(method.key, method) is not method:
        raise AdapterError(f"The key {method.key!r} is that of {METHODS[method.key].__name__}: choose another.")
    METHODS[method.key] = method
    return method


__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "IA3",
    "METHODS",
    "OFT",
    "AdaLoRA",
    "Bat",
    "BitFit",
    "Bottleneck",
    "Copy",
    "DeLoRA",
    "DiagOFT",
    "DoHa",
    "DoKr",
    "DoRA",
    "FourierFT",
    "Full",
    "GLoRA",
    "GraLoRA",
    "HiRA",
    "LoHa",
    "LoKr",
    "LoRA",
    "LycorisGLoRA",
    "MiSS",
    "NormTuning",
    "OutputBOFT",
    "PrefixTuning",
    "PromptTuning",
    "RandLoRA",
    "RoAd",
    "SHiRA",
    "TrainableTokens",
    "VBLoRA",
    "VeRA",
    "register",
]
