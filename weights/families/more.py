"""Other transformers for images and videos: AuraFlow, Lumina 2, Z-Image, LTX-Video."""

from __future__ import annotations

from weights.families.table import Table, same, under

_STEPS: Table = {"mlp.0": "linear_1", "mlp.2": "linear_2"}

_FEEDFORWARD: Table = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}

AURA_FLOW: Table = {
    **under("t_embedder", "time_step_proj", _STEPS),
    "cond_seq_linear": "context_embedder",
    "init_x_linear": "pos_embed.proj",
    **under(
        "double_layers.{i}",
        "joint_transformer_blocks.{i}",
        {
            **under("attn", "attn", {"w2q": "to_q", "w2k": "to_k", "w2v": "to_v", "w2o": "to_out.0"}),
            **under("attn", "attn", {"w1q": "add_q_proj", "w1k": "add_k_proj", "w1v": "add_v_proj"}),
            "attn.w1o": "attn.to_add_out",
            **under("mlpX", "ff", _FEEDFORWARD),
            **under("mlpC", "ff_context", _FEEDFORWARD),
            "modX.1": "norm1.linear",
            "modC.1": "norm1_context.linear",
        },
    ),
    **under(
        "single_layers.{i}",
        "single_transformer_blocks.{i}",
        {
            **under("attn", "attn", {"w1q": "to_q", "w1k": "to_k", "w1v": "to_v", "w1o": "to_out.0"}),
            **under("mlp", "ff", _FEEDFORWARD),
            "modCX.1": "norm1.linear",
        },
    ),
    "final_linear": "proj_out",
    "modF.1": ("norm_out.linear[2/2]", "norm_out.linear[1/2]"),
}

_ATTENTION: Table = {
    "qkv": ("to_q", "to_k", "to_v"),
    "out": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}

_REFINED: Table = {
    **under("attention", "attn", _ATTENTION),
    **under("feed_forward", "feed_forward", {"w1": "linear_1", "w2": "linear_2", "w3": "linear_3"}),
    "attention_norm2": "norm2",
    **same("ffn_norm1", "ffn_norm2"),
}
_MODULATED: Table = {**_REFINED, "attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"}

LUMINA_2: Table = {
    **under("t_embedder", "time_caption_embed.timestep_embedder", _STEPS),
    **under("cap_embedder", "time_caption_embed.caption_embedder", same("0", "1")),
    **under("context_refiner.{i}", "context_refiner.{i}", {**_REFINED, "attention_norm1": "norm1"}),
    **under("noise_refiner.{i}", "noise_refiner.{i}", _MODULATED),
    **under("layers.{i}", "layers.{i}", _MODULATED),
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}

Z_IMAGE: Table = {
    "x_embedder": "all_x_embedder.2-1",
    **under("context_refiner.{i}.attention", "context_refiner.{i}.attention", _ATTENTION),
    **under("noise_refiner.{i}.attention", "noise_refiner.{i}.attention", _ATTENTION),
    **under("layers.{i}.attention", "layers.{i}.attention", _ATTENTION),
    **under("final_layer", "all_final_layer.2-1", same("linear", "adaLN_modulation.1")),
}

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

TABLES = (AURA_FLOW, LUMINA_2, Z_IMAGE, LTX_VIDEO)
