"""HRA's tensors in foreign files."""

from weights.methods.core.peft import PeftLayout

PEFT = PeftLayout(
    "hra",
    "HRA",
    settings={"rank": ("r", 8), "gram_schmidt": ("apply_GS", False)},
    tensors={"hra_u": "hra_u"},
    biases=True,
)
