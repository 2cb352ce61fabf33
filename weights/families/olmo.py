"""OLMo."""

from weights.families.core.family import Architecture, Family

FAMILY = Family(architectures={"olmo": Architecture(interleaved=True), "olmo2": Architecture()})
