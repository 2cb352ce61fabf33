"""VB-LoRA's tensors in foreign files."""

from weights.adapter_file import LayerWeights
from weights.methods.core.peft import PeftLayout

_ENDS = {
    f"vblora_logits_{factor}{end}": f"vblora_logits_{factor}{end}"
    for factor in "AB"
    for end in ("", "_topk_indices", "_topk_weights")
}


def _problem(layer: LayerWeights) -> str | None:
    """The problem of the names of the tensors."""
    only = layer.hyperparameters.get("only_topk")
    ends = ("_topk_indices", "_topk_weights") if only else ("",)
    needed = sorted(f"vblora_logits_{factor}{end}" for factor in "AB" for end in ends)
    have = ", ".join(sorted(layer.tensors))
    return None if have == ", ".join(needed) else f"{have} instead of {', '.join(needed)}"


PEFT = PeftLayout(
    "vblora",
    "VBLORA",
    settings={
        "rank": ("r", 4),
        "num_vectors": ("num_vectors", 256),
        "vector_length": ("vector_length", 256),
        "topk": ("topk", 2),
        "only_topk": ("save_only_topk_weights", False),
    },
    tensors=_ENDS,
    optional=frozenset(_ENDS),
    shared={"vblora_vector_bank": "base_model.vblora_vector_bank"},
    biases=True,
    inert=frozenset({"init_logits_std", "init_vector_bank_bound", "vblora_dropout"}),
    check=_problem,
)
