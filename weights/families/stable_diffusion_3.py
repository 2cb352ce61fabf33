"""Stable Diffusion 3: the transformer of Stability AI."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.table import STEPS, Table, under

_ATTENTION: Table = {"qkv": ("to_q", "to_k", "to_v"), "proj": "to_out.0", "ln_q": "norm_q", "ln_k": "norm_k"}

SD_3: Table = {
    "x_embedder.proj": "pos_embed.proj",
    **under("t_embedder", "time_text_embed.timestep_embedder", STEPS),
    **under("y_embedder", "time_text_embed.text_embedder", STEPS),
    **under(
        "joint_blocks.{i}.x_block",
        "transformer_blocks.{i}",
        {
            **under("attn", "attn", _ATTENTION),
            **under("attn2", "attn2", _ATTENTION),
            "adaLN_modulation.1": "norm1.linear",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
        },
    ),
    **under(
        "joint_blocks.{i}.context_block",
        "transformer_blocks.{i}",
        {
            "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "attn.proj": "attn.to_add_out",
            "attn.ln_q": "attn.norm_added_q",
            "attn.ln_k": "attn.norm_added_k",
            "adaLN_modulation.1": ("norm1_context.linear", "attn.to_add_out[0/1]"),
            "mlp.fc1": "ff_context.net.0.proj",
            "mlp.fc2": "ff_context.net.2",
        },
    ),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": ("norm_out.linear[2/2]", "norm_out.linear[1/2]"),
}

LAST_OF_SD_3: Table = {
    "joint_blocks.{i}.context_block.adaLN_modulation.1": (
        "transformer_blocks.{i}.norm1_context.linear[2/2]",
        "transformer_blocks.{i}.norm1_context.linear[1/2]",
    )
}
"""The last block has no output for the text, and modulates it as the final layer does the image."""

FAMILY = Family(tables=(SD_3, LAST_OF_SD_3), components={"unet": ("transformer",)})
