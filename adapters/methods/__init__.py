"""The methods, one per file: formula, initialisation, names of the tensors."""

from collections.abc import Mapping

from adapters.method import Method
from adapters.methods.adalora import AdaLoRA
from adapters.methods.copied import Copy
from adapters.methods.dora import DoRA
from adapters.methods.lora import LoRA

METHODS: Mapping[str, type[Method]] = {
    method.key: method
    for method in (
        LoRA,
        AdaLoRA,
        Copy,
        DoRA,
    )
}
"""Every method by the name that files give it."""

__all__ = [
    "METHODS",
    "AdaLoRA",
    "Copy",
    "DoRA",
    "LoRA",
]
