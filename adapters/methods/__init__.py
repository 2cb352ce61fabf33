"""The methods, one per file: formula, initialisation, names of the tensors."""

from collections.abc import Mapping

from adapters.method import Method
from adapters.methods.bottleneck import Bottleneck
from adapters.methods.copied import Copy
from adapters.methods.lora import LoRA
from adapters.methods.prefix import PrefixTuning
from adapters.methods.prompt import PromptTuning

METHODS: Mapping[str, type[Method]] = {
    method.key: method
    for method in (
        LoRA,
        Bottleneck,
        Copy,
        PrefixTuning,
        PromptTuning,
    )
}
"""Every method by the name that files give it."""

__all__ = [
    "METHODS",
    "Bottleneck",
    "Copy",
    "LoRA",
    "PrefixTuning",
    "PromptTuning",
]
