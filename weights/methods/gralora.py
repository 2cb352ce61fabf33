"""GraLoRA's tensors in foreign files."""

from weights.methods.core.peft import PeftLayout

PEFT = PeftLayout(
    "gralora",
    "GRALORA",
    settings={
        "rank": ("r", 32),
        "alpha": ("alpha", 64.0),
        "blocks": ("gralora_k", 2),
        "hybrid_rank": ("hybrid_r", 0),
    },
    tensors={
        "gralora_A": "gralora_A",
        "gralora_B": "gralora_B",
        "gralora_A_general": "gralora_A_general.weight",
        "gralora_B_general": "gralora_B_general.weight",
    },
    optional=frozenset({"gralora_A_general", "gralora_B_general"}),
    biases=True,
    inert=frozenset({"gralora_dropout"}),
)
