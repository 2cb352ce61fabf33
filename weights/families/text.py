"""Text encoders: CLIP of OpenAI and OpenCLIP. T5 has the same names everywhere."""

from __future__ import annotations

from weights.families.table import Table, same, under

_CLIP: Table = same(
    "embeddings.token_embedding",
    "embeddings.position_embedding",
    *(
        f"encoder.layers.{{i}}.{name}"
        for name in (
            *(f"self_attn.{projection}_proj" for projection in ("q", "k", "v", "out")),
            *("mlp.fc1", "mlp.fc2", "layer_norm1", "layer_norm2"),
        )
    ),
    "final_layer_norm",
)

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

# A text encoder without a projection has no such level since version 5 of transformers, one with a projection does.
TABLES = (
    under("text_model", "", _CLIP),
    under("", "text_model", _CLIP),
    under("", "text_model", OPEN_CLIP),
    OPEN_CLIP,
)
