"""Chroma: Flux with other conditions."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.table import MLP, Table, under

CHROMA: Table = {
    **under("distilled_guidance_layer.layers.{i}", "distilled_guidance_layer.layers.{i}", MLP),
    "distilled_guidance_layer.norms.{i}.scale": "distilled_guidance_layer.norms.{i}",
}
"""The layers that Flux does not have."""

FAMILY = Family(tables=(CHROMA,), components={"unet": ("transformer",)})
