"""The attention that Lumina 2 and Z-Image share."""

from __future__ import annotations

from weights.families.core.table import Table

ATTENTION: Table = {
    "qkv": ("to_q", "to_k", "to_v"),
    "out": "to_out.0",
    "q_norm": "norm_q",
    "k_norm": "norm_k",
}
