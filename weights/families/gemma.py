"""Gemma."""

from weights.families.core.family import Architecture, Family

FAMILY = Family(architectures=dict.fromkeys(("gemma", "gemma2", "gemma3"), Architecture()))
