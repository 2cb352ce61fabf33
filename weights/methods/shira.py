"""SHiRA's tensors in foreign files."""

from weights.methods.core.peft import PeftLayout

PEFT = PeftLayout(
    "shira",
    "SHIRA",
    settings={"rank": ("r", 32), "seed": ("random_seed", None)},
    tensors={"shira_weight": "shira_weight", "shira_indices": "shira_indices"},
    # How the entries were chosen: which they are is in the file.
    inert=frozenset({"mask_type"}),
)
