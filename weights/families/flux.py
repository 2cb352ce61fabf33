"""Models of Black Forest Labs, and those that descend from them."""

from __future__ import annotations

from weights.families.table import Table, same, under

_MLP: Table = {"in_layer": "linear_1", "out_layer": "linear_2"}
_NORMS: Table = {
    "norm.query_norm": "norm_q",
    "norm.key_norm": "norm_k",
    "norm.query_norm.scale": "norm_q",
    "norm.key_norm.scale": "norm_k",
}
_ADDED_NORMS: Table = {name: str(target).replace("norm_", "norm_added_") for name, target in _NORMS.items()}
_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")

_ATTENTIONS: Table = {
    **under("img_attn", "attn", {"qkv": _QKV, "proj": "to_out.0", **_NORMS}),
    **under("txt_attn", "attn", {"qkv": _ADDED_QKV, "proj": "to_add_out", **_ADDED_NORMS}),
}

_DOUBLE: Table = {
    **_ATTENTIONS,
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    # XLabs names the processors of the attentions, 1 for the image and 2 for the text.
    **under("processor", "attn", {"qkv_lora1": _QKV, "proj_lora1": "to_out.0"}),
    **under("processor", "attn", {"qkv_lora2": _ADDED_QKV, "proj_lora2": "to_add_out"}),
}

_SINGLE: Table = {
    **under("", "attn", _NORMS),
    "modulation.lin": "norm.linear",
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": "proj_out",
    **under("processor", "", {"qkv_lora": ("attn.to_q", "attn.to_k", "attn.to_v"), "proj_lora": "proj_out"}),
}

FLUX: Table = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **under("time_in", "time_text_embed.timestep_embedder", _MLP),
    **under("vector_in", "time_text_embed.text_embedder", _MLP),
    **under("guidance_in", "time_text_embed.guidance_embedder", _MLP),
    **under("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE),
    **under("single_blocks.{i}", "single_transformer_blocks.{i}", _SINGLE),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": ("norm_out.linear[2/2]", "norm_out.linear[1/2]"),
}

CHROMA: Table = {
    **under("distilled_guidance_layer.layers.{i}", "distilled_guidance_layer.layers.{i}", _MLP),
    "distilled_guidance_layer.norms.{i}.scale": "distilled_guidance_layer.norms.{i}",
}
"""What Flux does not have."""

_DOUBLE_2: Table = {
    **_ATTENTIONS,
    "img_mlp.0": "ff.linear_in",
    "img_mlp.2": "ff.linear_out",
    "txt_mlp.0": "ff_context.linear_in",
    "txt_mlp.2": "ff_context.linear_out",
}

FLUX_2: Table = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **under("time_in", "time_guidance_embed.timestep_embedder", _MLP),
    **under("guidance_in", "time_guidance_embed.guidance_embedder", _MLP),
    "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
    "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
    "single_stream_modulation.lin": "single_stream_modulation.linear",
    **under("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE_2),
    **under(
        "single_blocks.{i}",
        "single_transformer_blocks.{i}.attn",
        {**_NORMS, "linear1": "to_qkv_mlp_proj", "linear2": "to_out"},
    ),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": ("norm_out.linear[2/2]", "norm_out.linear[1/2]"),
}

_HUNYUAN_ATTENTIONS: Table = {
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
_STEPS: Table = {"mlp.0": "linear_1", "mlp.2": "linear_2"}

HUNYUAN_VIDEO: Table = {
    "img_in.proj": "x_embedder.proj",
    **under("time_in", "time_text_embed.timestep_embedder", _STEPS),
    **under("guidance_in", "time_text_embed.guidance_embedder", _STEPS),
    **under("vector_in", "time_text_embed.text_embedder", _MLP),
    "txt_in.input_embedder": "context_embedder.proj_in",
    **under("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", _STEPS),
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
    **under("double_blocks.{i}", "transformer_blocks.{i}.attn", _HUNYUAN_ATTENTIONS),
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

TABLES = (FLUX, CHROMA, FLUX_2, HUNYUAN_VIDEO)
