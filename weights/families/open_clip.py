"""OpenCLIP, a text encoder with the layers of CLIP."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.table import Table, under

_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
OPEN_CLIP: Table = {
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding",
    **under(
        "transformer.resblocks.{i}",
        "encoder.layers.{i}",
        {
            "attn.in_proj": _QKV,
            "attn.in_proj_weight": _QKV,
            "attn.in_proj_bias": tuple(f"{name}.bias" for name in _QKV),
            "attn.out_proj": "self_attn.out_proj",
            "mlp.c_fc": "mlp.fc1",
            "mlp.c_proj": "mlp.fc2",
            "ln_1": "layer_norm1",
            "ln_2": "layer_norm2",
        },
    ),
    "ln_final": "final_layer_norm",
}

FAMILY = Family(tables=(under("", "text_model", OPEN_CLIP), OPEN_CLIP))
