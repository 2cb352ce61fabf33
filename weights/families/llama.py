"""Llama, and the language models with its layers, of which llama.cpp interleaves the outputs of q and k."""

from weights.families.core.family import Architecture, Family

_NAMES = ("arcee", "deci", "granite", "llama", "minicpm", "nanbeige", "smollm3")

FAMILY = Family(architectures=dict.fromkeys(_NAMES, Architecture(interleaved=True)))
