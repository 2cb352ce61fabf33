"""Wan, also with control (VACE)."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.table import Table, same, under

_ATTENTION: Table = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "k_img": "add_k_proj",
    "v_img": "add_v_proj",
    "norm_k_img": "norm_added_k",
    **same("norm_q", "norm_k"),
}
_BLOCK: Table = {
    **under("self_attn", "attn1", _ATTENTION),
    **under("cross_attn", "attn2", _ATTENTION),
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",
    "modulation": "scale_shift_table",
}

WAN: Table = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    **under("blocks.{i}", "blocks.{i}", _BLOCK),
    **under("vace_blocks.{i}", "vace_blocks.{i}", {**_BLOCK, "before_proj": "proj_in", "after_proj": "proj_out"}),
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}

FAMILY = Family(tables=(WAN,), components={"unet": ("transformer",)})
