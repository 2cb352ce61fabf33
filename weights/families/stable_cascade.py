"""Stable Cascade, whose first model is the prior of its pipeline."""

from weights.families.core.family import Family

FAMILY = Family(components={"unet": ("prior",)})
