"""Z-Image."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.lumina_attention import ATTENTION
from weights.families.core.table import Table, same, under

Z_IMAGE: Table = {
    "x_embedder": "all_x_embedder.2-1",
    **under("context_refiner.{i}.attention", "context_refiner.{i}.attention", ATTENTION),
    **under("noise_refiner.{i}.attention", "noise_refiner.{i}.attention", ATTENTION),
    **under("layers.{i}.attention", "layers.{i}.attention", ATTENTION),
    **under("final_layer", "all_final_layer.2-1", same("linear", "adaLN_modulation.1")),
}

FAMILY = Family(tables=(Z_IMAGE,), components={"unet": ("transformer",)})
