"""CLIP of OpenAI, a text encoder."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.table import Table, same, under

CLIP: Table = same(
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

FAMILY = Family(
    # A text encoder without a projection has no such level since version 5 of transformers, one with a projection does.
    tables=(under("text_model", "", CLIP), under("", "text_model", CLIP)),
    components={"clip_l": ("text_encoder",), "clip_g": ("text_encoder_2",)},
    classes={"CLIPAttention": ("CLIPSdpaAttention", "CLIPFlashAttention2")},
)
