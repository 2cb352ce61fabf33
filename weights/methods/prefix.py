"""The tensors of prefix tuning in foreign files."""

from weights.adapter_file import AdapterFile, LayerWeights
from weights.methods import prompt
from weights.methods.core.peft import PeftLayout, Settings


def _problem(layer: LayerWeights) -> str | None:
    """The problem of the shape of the virtual tokens, or of the number of layers."""
    layers = layer.hyperparameters.get("num_layers")
    if isinstance(layers, int) and layers < 1:
        return f"a prefix for {layers} layers"
    return prompt.problem(layer)


def _of_file(adapter: AdapterFile) -> Settings:
    said, layers = prompt.of_file(adapter), adapter.layers[""].hyperparameters.get("num_layers")
    return {**said, "token_dim": said["token_dim"] // (2 * layers)} if isinstance(layers, int) else said


PEFT = PeftLayout(
    "prefix_tuning",
    "PREFIX_TUNING",
    settings={
        "num_virtual_tokens": ("num_virtual_tokens", 0),
        "num_layers": ("num_layers", None),
        "num_attention_heads": ("num_attention_heads", None),
    },
    tensors={"prompt_embeddings": "prompt_embeddings"},
    whole_model=True,
    fixed={"num_transformer_submodules": (1,)},
    # Files hold the output of the projecting network, and nothing of the network.
    inert=frozenset({"encoder_hidden_size", "prefix_projection", "token_dim"}),
    check=_problem,
    of_file=_of_file,
)
