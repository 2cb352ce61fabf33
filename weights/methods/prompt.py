"""The tensors of prompt tuning in foreign files."""

from weights.adapter_file import AdapterFile, LayerWeights
from weights.methods.core.peft import PeftLayout, Settings


def problem(layer: LayerWeights) -> str | None:
    """The problem of the shape of the virtual tokens."""
    shape = tuple(layer.tensors["prompt_embeddings"].shape)
    number = layer.hyperparameters.get("num_virtual_tokens")
    return None if len(shape) == 2 and shape[0] == number else f"{shape} for {number} virtual tokens"


def of_file(adapter: AdapterFile) -> Settings:
    """The task and the width."""
    width = adapter.layers[""].tensors["prompt_embeddings"].shape[1]
    return {"task_type": adapter.task, "token_dim": width}


PEFT = PeftLayout(
    "prompt_tuning",
    "PROMPT_TUNING",
    settings={"num_virtual_tokens": ("num_virtual_tokens", 0)},
    tensors={"prompt_embeddings": "prompt_embeddings"},
    whole_model=True,
    fixed={"num_transformer_submodules": (1,)},
    inert=frozenset(
        {
            "num_attention_heads",
            "num_layers",
            "prompt_tuning_init",
            "prompt_tuning_init_text",
            "token_dim",
            "tokenizer_kwargs",
            "tokenizer_name_or_path",
        }
    ),
    check=problem,
    of_file=of_file,
)
