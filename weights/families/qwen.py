"""Qwen 2 and 3, also with experts."""

from weights.families.core.family import Architecture, Family

_EXPERTS = Architecture(own=(".mlp.gate",))

FAMILY = Family(
    architectures={
        "qwen2": Architecture(),
        "qwen2moe": _EXPERTS,
        "qwen3": Architecture(),
        "qwen3moe": _EXPERTS,
    }
)
