"""HunyuanVideo."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.table import MLP, STEPS, Table, same, under

_ATTENTION: Table = {
    "img_attn_qkv": ("to_q", "to_k", "to_v"),
    "img_attn_proj": "to_out.0",
    "img_attn_q_norm": "norm_q",
    "img_attn_k_norm": "norm_k",
    "txt_attn_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "txt_attn_proj": "to_add_out",
    "txt_attn_q_norm": "norm_added_q",
    "txt_attn_k_norm": "norm_added_k",
}
_FEEDFORWARD: Table = {"fc1": "net.0.proj", "fc2": "net.2"}

HUNYUAN_VIDEO: Table = {
    "img_in.proj": "x_embedder.proj",
    **under("time_in", "time_text_embed.timestep_embedder", STEPS),
    **under("guidance_in", "time_text_embed.guidance_embedder", STEPS),
    **under("vector_in", "time_text_embed.text_embedder", MLP),
    "txt_in.input_embedder": "context_embedder.proj_in",
    **under("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", STEPS),
    **under("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", same("linear_1", "linear_2")),
    **under(
        "txt_in.individual_token_refiner.blocks.{i}",
        "context_embedder.token_refiner.refiner_blocks.{i}",
        {
            **same("norm1", "norm2"),
            "self_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "self_attn_proj": "attn.to_out.0",
            **under("mlp", "ff", _FEEDFORWARD),
            "adaLN_modulation.1": "norm_out.linear",
        },
    ),
    **under("double_blocks.{i}", "transformer_blocks.{i}.attn", _ATTENTION),
    **under(
        "double_blocks.{i}",
        "transformer_blocks.{i}",
        {
            "img_mod.linear": "norm1.linear",
            "txt_mod.linear": "norm1_context.linear",
            **under("img_mlp", "ff", _FEEDFORWARD),
            **under("txt_mlp", "ff_context", _FEEDFORWARD),
        },
    ),
    **under(
        "single_blocks.{i}",
        "single_transformer_blocks.{i}",
        {
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": "proj_out",
            "q_norm": "attn.norm_q",
            "k_norm": "attn.norm_k",
            "modulation.linear": "norm.linear",
        },
    ),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": ("norm_out.linear[2/2]", "norm_out.linear[1/2]"),
}

FAMILY = Family(tables=(HUNYUAN_VIDEO,), components={"unet": ("transformer",)})
