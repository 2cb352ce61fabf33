"""The tensors of trained rows of embeddings in foreign files."""

from weights.adapter_file import LayerWeights
from weights.methods.core.peft import PeftLayout


def _problem(layer: LayerWeights) -> str | None:
    rows, tokens = layer.tensors["trainable_tokens_delta"], layer.hyperparameters.get("tokens")
    if rows.ndim == 2 and isinstance(tokens, tuple) and len(rows) == len(tokens):
        return None
    return f"rows of the shape {tuple(rows.shape)}, which are not one for each of the tokens {tokens}"


PEFT = PeftLayout(
    "trainable_tokens",
    "TRAINABLE_TOKENS",
    settings={"tokens": ("token_indices", ())},
    tensors={"trainable_tokens_delta": "trainable_tokens_delta"},
    check=_problem,
)
