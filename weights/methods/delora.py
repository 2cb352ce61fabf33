"""DeLoRA's tensors in foreign files."""

from weights.methods.core.peft import PeftLayout

PEFT = PeftLayout(
    "delora",
    "DELORA",
    settings={"rank": ("r", 8), "boundary": ("delora_lambda", 15.0)},
    patterns={"rank": "rank_pattern", "boundary": "lambda_pattern"},
    tensors={name: name for name in ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")},
    biases=True,
    inert=frozenset({"module_dropout"}),
)
