"""Flux, of Black Forest Labs."""

from __future__ import annotations

from weights.families.core.black_forest import ADDED_QKV, ATTENTIONS, NORMS, QKV
from weights.families.core.family import Family
from weights.families.core.table import MLP, Table, under

_DOUBLE: Table = {
    **ATTENTIONS,
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    # XLabs names the processors of the attentions, 1 for the image and 2 for the text.
    **under("processor", "attn", {"qkv_lora1": QKV, "proj_lora1": "to_out.0"}),
    **under("processor", "attn", {"qkv_lora2": ADDED_QKV, "proj_lora2": "to_add_out"}),
}

_SINGLE: Table = {
    **under("", "attn", NORMS),
    "modulation.lin": "norm.linear",
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
    **under("processor", "", {"qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"), "proj_lora": "proj_out"}),
}

FLUX: Table = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **under("time_in", "time_text_embed.timestep_embedder", MLP),
    **under("vector_in", "time_text_embed.text_embedder", MLP),
    **under("guidance_in", "time_text_embed.guidance_embedder", MLP),
    **under("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE),
    **under("single_blocks.{i}", "single_transformer_blocks.{i}", _SINGLE),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": ("norm_out.linear[2/2]", "norm_out.linear[1/2]"),
}

FAMILY = Family(tables=(FLUX,), components={"unet": ("transformer",)})
