"""StarCoder 2."""

from weights.families.core.family import Architecture, Family

FAMILY = Family(architectures={"starcoder2": Architecture(own=(".mlp.c_fc", ".mlp.c_proj"))})
