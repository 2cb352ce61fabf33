"""The methods, one per file: formula, initialisation, names of the tensors."""

from collections.abc import Mapping

from adapters.method import Method
from adapters.methods.copied import Copy
from adapters.methods.loha import DoHa, LoHa
from adapters.methods.lokr import DoKr, LoKr
from adapters.methods.lora import LoRA

METHODS: Mapping[str, type[Method]] = {
    method.key: method
    for method in (
        LoRA,
        LoHa,
        DoHa,
        LoKr,
        DoKr,
        Copy,
    )
}
"""Every method by the name that files give it."""

__all__ = [
    "METHODS",
    "Copy",
    "DoHa",
    "DoKr",
    "LoHa",
    "LoKr",
    "LoRA",
]
