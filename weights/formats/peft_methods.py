"""How PEFT writes each method: the type and the settings in the JSON file, and the ends of the tensors' names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from weights.adapter_file import AdapterFile, Hyperparameter, LayerWeights

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Grammar:
    """One method in the files of PEFT.

    Attributes:
        method: The key of the method.
        type: PEFT's name for it.
        settings: For each hyperparameter, its name in the JSON file and PEFT's default.
        patterns: For a hyperparameter that may differ between layers, the setting that says where.
        tensors: For each tensor, the end of its name in the file.
        optional: Tensors that a layer may lack.
        shared: For each tensor that all layers have in common, its whole name in the file.
        whole: Whether there is one adapter for the whole model: its tensors have whole names, and its layer no path.
        fixed: Settings that have to have one of these values, the first of which is written.
        inert: Settings that do not change what the saved tensors compute.
        check: Says what is wrong with a layer besides missing tensors, or None.
        of_layer: What else the settings say of a layer: takes its path and its tensors.
        of_file: What else the settings have to say of an adapter.
    """

    method: str
    type: str
    settings: Mapping[str, tuple[str, Any]]
    tensors: Mapping[str, str]
    patterns: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    whole: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    check: Callable[[LayerWeights], str | None] = lambda layer: None
    of_layer: Callable[[Settings, str, Mapping[str, Tensor]], Mapping[str, Hyperparameter]] = lambda *_: {}
    of_file: Callable[[AdapterFile], Settings] = lambda adapter: {}

    @property
    def prefix(self) -> str:
        """What names of layers begin with in the file."""
        return "base_model." if self.whole else "base_model.model."

    def key(self, path: str, name: str) -> str:
        """The name of a layer's tensor in the file."""
        return self.tensors[name] if self.whole else f"{self.prefix}{path}.{self.tensors[name]}"


def _lora_problem(layer: LayerWeights) -> str | None:
    """What is wrong with the names or the shapes of A and B."""
    pairs = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
    factors = {name: tensor for name, tensor in layer.tensors.items() if name.endswith(("_A", "_B"))}
    if factors.keys() not in pairs:
        return f"{', '.join(sorted(layer.tensors))} instead of lora_A and lora_B"
    a, b = (tuple(factors[name].shape) for name in sorted(factors))
    rank = layer.hyperparameters.get("rank")
    if len(a) == len(b) >= 2 and set(b[2:]) <= {1} and rank and a[0] == rank and b[1] == rank:
        return None
    return f"lora_A {a} and lora_B {b}, which do not fit each other and rank {rank}"


def _lora_start(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    start = config.get("init_lora_weights", True)
    return {"init": start} if start in ("pissa", "olora") else {}


def _virtual_problem(layer: LayerWeights) -> str | None:
    """What is wrong with the shape of the virtual tokens."""
    shape = tuple(layer.tensors["prompt_embeddings"].shape)
    number = layer.hyperparameters.get("num_virtual_tokens")
    return None if len(shape) == 2 and shape[0] == number else f"{shape} for {number} virtual tokens"


def _of_prompt(adapter: AdapterFile) -> Settings:
    width = adapter.layers[""].tensors["prompt_embeddings"].shape[1]
    return {"task_type": adapter.task, "token_dim": width}


def _of_prefix(adapter: AdapterFile) -> Settings:
    width, layers = _of_prompt(adapter)["token_dim"], adapter.layers[""].hyperparameters.get("num_layers")
    return {"task_type": adapter.task, "token_dim": width // (2 * int(layers or 1))}


_LORA_ENDS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_B.bias": "lora_B.bias",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
}
_LORA_SETTINGS = {
    "rank": ("r", 8),
    "alpha": ("lora_alpha", 8.0),
    "dropout": ("lora_dropout", 0.0),
    "rslora": ("use_rslora", False),
    "bias": ("lora_bias", False),
}
# How the tensors were found and trained: nothing of it changes what they compute.
_LORA_INERT = frozenset(
    {
        "corda_config",
        "eva_config",
        "loftq_config",
        "lora_ga_config",
        "megatron_config",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
    }
)
_RANKS_AND_ALPHAS = {"rank": "rank_pattern", "alpha": "alpha_pattern"}

GRAMMARS: tuple[Grammar, ...] = (
    Grammar(
        "lora",
        "LORA",
        settings=_LORA_SETTINGS,
        patterns=_RANKS_AND_ALPHAS,
        tensors=_LORA_ENDS,
        optional=frozenset(_LORA_ENDS),
        fixed={
            "use_dora": (False,),
            # The other initialisations change the base model's weights too when PEFT loads the file.
            "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora"),
        },
        inert=_LORA_INERT,
        check=_lora_problem,
        of_layer=_lora_start,
    ),
    Grammar(
        "prompt_tuning",
        "PROMPT_TUNING",
        settings={"num_virtual_tokens": ("num_virtual_tokens", 0)},
        tensors={"prompt_embeddings": "prompt_embeddings"},
        whole=True,
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
        check=_virtual_problem,
        of_file=_of_prompt,
    ),
    Grammar(
        "prefix_tuning",
        "PREFIX_TUNING",
        settings={
            "num_virtual_tokens": ("num_virtual_tokens", 0),
            "num_layers": ("num_layers", None),
            "num_attention_heads": ("num_attention_heads", None),
        },
        tensors={"prompt_embeddings": "prompt_embeddings"},
        whole=True,
        fixed={"num_transformer_submodules": (1,)},
        # Files hold what the network of a projection makes, and nothing of the network.
        inert=frozenset({"encoder_hidden_size", "prefix_projection", "token_dim"}),
        check=_virtual_problem,
        of_file=_of_prefix,
    ),
)
"""Every method that PEFT's files can hold."""
