"""Lumina 2."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.lumina_attention import ATTENTION
from weights.families.core.table import STEPS, Table, same, under

_REFINED: Table = {
    **under("attention", "attn", ATTENTION),
    **under("feed_forward", "feed_forward", {"w1": "linear_1", "w2": "linear_2", "w3": "linear_3"}),
    "attention_norm2": "norm2",
    **same("ffn_norm1", "ffn_norm2"),
}
_MODULATED: Table = {**_REFINED, "attention_norm1": "norm1.norm", "adaLN_modulation.1": "norm1.linear"}

LUMINA_2: Table = {
    **under("t_embedder", "time_caption_embed.timestep_embedder", STEPS),
    **under("cap_embedder", "time_caption_embed.caption_embedder", same("0", "1")),
    **under("context_refiner.{i}", "context_refiner.{i}", {**_REFINED, "attention_norm1": "norm1"}),
    **under("noise_refiner.{i}", "noise_refiner.{i}", _MODULATED),
    **under("layers.{i}", "layers.{i}", _MODULATED),
    "final_layer.adaLN_modulation.1": "norm_out.linear_1",
    "final_layer.linear": "norm_out.linear_2",
}

FAMILY = Family(tables=(LUMINA_2,), components={"unet": ("transformer",)})
