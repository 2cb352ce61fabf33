"""AuraFlow."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.table import STEPS, Table, under

_FEEDFORWARD: Table = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}

AURA_FLOW: Table = {
    **under("t_embedder", "time_step_proj", STEPS),
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

FAMILY = Family(tables=(AURA_FLOW,), components={"unet": ("transformer",)})
