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
        aliases: Other ends of names that are read, and the tensor that each stands for.
        optional: Tensors that a layer may lack.
        shared: For each tensor that all layers have in common, its whole name in the file.
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
    aliases: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    check: Callable[[LayerWeights], str | None] = lambda layer: None
    of_layer: Callable[[Settings, str, Mapping[str, Tensor]], Mapping[str, Hyperparameter]] = lambda *_: {}
    of_file: Callable[[AdapterFile], Settings] = lambda adapter: {}

    def key(self, path: str, name: str) -> str:
        """The name of a layer's tensor in the file."""
        return f"base_model.model.{path}.{self.tensors[name]}"

    def ends(self) -> Mapping[str, str]:
        """The tensor that each end of a name stands for, the longest end first."""
        ends = {**{end: name for name, end in self.tensors.items()}, **self.aliases}
        return dict(sorted(ends.items(), key=lambda item: -len(item[0])))


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
    """The start that PEFT subtracts from the weight: embeddings have none, whatever the settings say."""
    start = config.get("init_lora_weights", True)
    return {"init": start} if start in ("pissa", "olora") and "lora_embedding_A" not in tensors else {}


def _adalora_problem(layer: LayerWeights) -> str | None:
    """What is wrong with the shapes of A, B and E."""
    a, b, e = (tuple(layer.tensors[name].shape) for name in ("lora_A", "lora_B", "lora_E"))
    if len(a) == len(b) == 2 and e == (a[0], 1) and b[1] == a[0]:
        return None
    return f"lora_A {a}, lora_B {b} and lora_E {e}, which do not fit each other"


def _adalora_rows(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """How many rows are left, where they are fewer, and PEFT's alpha for one that is not positive."""
    rank, rows = int(config["init_r"]), len(tensors.get("lora_E", ()))
    kept: Mapping[str, Hyperparameter] = {"kept": rows} if rows != rank else {}
    return kept if config["lora_alpha"] > 0 else {**kept, "alpha": float(rank)}


def _rank_pattern(adapter: AdapterFile) -> Settings:
    """Which rows of each layer are left: PEFT only counts them, when it loads a file."""
    pattern = {
        f"{path}.lora_E": [row < len(layer.tensors["lora_E"]) for row in range(int(layer.hyperparameters["rank"] or 0))]
        for path, layer in adapter.layers.items()
        if layer.method == "adalora"
    }
    return {"rank_pattern": None if all(map(all, pattern.values())) else pattern}


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
# The schedule of the ranks, and what PEFT's AdaLoRA takes over from its LoRA and does not use.
_ADALORA_INERT = frozenset(
    {
        "alpha_pattern",
        "beta1",
        "beta2",
        "deltaT",
        "init_lora_weights",
        "orth_reg_weight",
        "r",
        "rank_pattern",
        "target_r",
        "tfinal",
        "tinit",
        "total_step",
        "use_rslora",
    }
)
_RANKS_AND_ALPHAS = {"rank": "rank_pattern", "alpha": "alpha_pattern"}
# The other initialisations change the base model's weights too when PEFT loads the file.
_LORA_STARTS = (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora")

GRAMMARS: tuple[Grammar, ...] = (
    Grammar(
        "lora",
        "LORA",
        settings=_LORA_SETTINGS,
        patterns=_RANKS_AND_ALPHAS,
        tensors=_LORA_ENDS,
        optional=frozenset(_LORA_ENDS),
        fixed={"use_dora": (False,), "init_lora_weights": _LORA_STARTS},
        inert=_LORA_INERT,
        check=_lora_problem,
        of_layer=_lora_start,
    ),
    Grammar(
        "dora",
        "LORA",
        settings=_LORA_SETTINGS,
        patterns=_RANKS_AND_ALPHAS,
        tensors={**_LORA_ENDS, "lora_magnitude_vector": "lora_magnitude_vector"},
        aliases={"lora_magnitude_vector.weight": "lora_magnitude_vector"},
        optional=frozenset(_LORA_ENDS),
        fixed={"use_dora": (True,), "init_lora_weights": _LORA_STARTS},
        inert=_LORA_INERT,
        check=_lora_problem,
        of_layer=_lora_start,
    ),
    Grammar(
        "adalora",
        "ADALORA",
        settings={"rank": ("init_r", 12), "alpha": ("lora_alpha", 8.0), "dropout": ("lora_dropout", 0.0)},
        tensors={name: name for name in ("lora_A", "lora_B", "lora_E")},
        fixed={"use_dora": (False,), "lora_bias": (False,)},
        inert=_LORA_INERT | _ADALORA_INERT,
        check=_adalora_problem,
        of_layer=_adalora_rows,
        # PEFT refuses a configuration without steps.
        of_file=lambda adapter: {"total_step": 1, **_rank_pattern(adapter)},
    ),
)
"""Every method that PEFT's files can hold."""
