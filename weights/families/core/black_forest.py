"""Tables that the models of Black Forest Labs share, and those that descend from them."""

from __future__ import annotations

from weights.families.core.table import Table, under

NORMS: Table = {
    "norm.query_norm": "norm_q",
    "norm.key_norm": "norm_k",
    "norm.query_norm.scale": "norm_q",
    "norm.key_norm.scale": "norm_k",
}
_ADDED_NORMS: Table = {name: str(target).replace("norm_", "norm_added_") for name, target in NORMS.items()}
QKV = ("to_q", "to_k", "to_v")
ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")

ATTENTIONS: Table = {
    **under("img_attn", "attn", {"qkv": QKV, "proj": "to_out.0", **NORMS}),
    **under("txt_attn", "attn", {"qkv": ADDED_QKV, "proj": "to_add_out", **_ADDED_NORMS}),
}
