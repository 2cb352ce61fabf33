"""Phi 3."""

from weights.families.core.family import Architecture, Family

FAMILY = Family(architectures={"phi3": Architecture(own=(".qkv_proj", ".gate_up_proj"))})
