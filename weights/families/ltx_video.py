"""LTX-Video."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.table import Table, same, under

LTX_VIDEO: Table = {
    "patchify_proj": "proj_in",
    **under(
        "adaln_single",
        "time_embed",
        same("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2"),
    ),
    **{
        f"transformer_blocks.{{i}}.{attention}.{letter}_norm": f"transformer_blocks.{{i}}.{attention}.norm_{letter}"
        for attention in ("attn1", "attn2")
        for letter in "qk"
    },
}

FAMILY = Family(tables=(LTX_VIDEO,), components={"unet": ("transformer",)})
