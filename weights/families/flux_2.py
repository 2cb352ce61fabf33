"""Flux 2, of Black Forest Labs."""

from __future__ import annotations

from weights.families.core.black_forest import ATTENTIONS, NORMS
from weights.families.core.family import Family
from weights.families.core.table import MLP, Table, under

_DOUBLE: Table = {
    **ATTENTIONS,
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}

FLUX_2: Table = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **under("time_in", "time_guidance_embed.timestep_embedder", MLP),
    **under("guidance_in", "time_guidance_embed.guidance_embedder", MLP),
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    **under("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE),
    **under(
        "single_blocks.{i}",
        "single_transformer_blocks.{i}.attn",
        {**NORMS, "linear1": "to_qkv_mlp_proj", "linear2": "to_out"},
    ),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": ("norm_out.linear[2/2]", "norm_out.linear[1/2]"),
}

FAMILY = Family(tables=(FLUX_2,), components={"unet": ("transformer",)})
