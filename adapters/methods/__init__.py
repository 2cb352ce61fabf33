"""The methods, one per file: formula, initialisation, names of the tensors."""

from collections.abc import Mapping

from adapters.method import Method
from adapters.methods.bitfit import BitFit
from adapters.methods.copied import Copy
from adapters.methods.full import Full
from adapters.methods.lora import LoRA
from adapters.methods.norm import NormTuning
from adapters.methods.tokens import TrainableTokens

METHODS: Mapping[str, type[Method]] = {
    method.key: method
    for method in (
        LoRA,
        Full,
        BitFit,
        NormTuning,
        TrainableTokens,
        Copy,
    )
}
"""Every method by the name that files give it."""

__all__ = [
    "METHODS",
    "BitFit",
    "Copy",
    "Full",
    "LoRA",
    "NormTuning",
    "TrainableTokens",
]
