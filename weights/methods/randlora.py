"""RandLoRA's tensors in foreign files."""

from weights.methods.core.peft import PeftLayout

PEFT = PeftLayout(
    "randlora",
    "RANDLORA",
    settings={
        "rank": ("r", 32),
        "alpha": ("randlora_alpha", 640.0),
        "seed": ("projection_prng_key", 0),
        "sparse": ("sparse", False),
        "very_sparse": ("very_sparse", False),
    },
    tensors={"randlora_lambda": "randlora_lambda", "randlora_gamma": "randlora_gamma"},
    shared={"randlora_A": "base_model.randlora_A", "randlora_B": "base_model.randlora_B"},
    shared_if="save_projection",
    biases=True,
    inert=frozenset({"randlora_dropout"}),
)
