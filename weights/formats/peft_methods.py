"""How PEFT writes each method: the type and the settings in the JSON file, and the ends of the tensors' names."""

from __future__ import annotations

import re
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
        fixed: Settings that have to have one of these values, the first of which is written.
        inert: Settings that do not change what the saved tensors compute.
        read: Settings that only `of_layer` reads, each with what says whether a value is one that it can have.
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
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    read: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    check: Callable[[LayerWeights], str | None] = lambda layer: None
    of_layer: Callable[[Settings, str, Mapping[str, Tensor]], Mapping[str, Hyperparameter]] = lambda *_: {}
    of_file: Callable[[AdapterFile], Settings] = lambda adapter: {}

    def key(self, path: str, name: str) -> str:
        """The name of a layer's tensor in the file."""
        return f"base_model.model.{path}.{self.tensors[name]}"


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


def _names_modules(value: Any) -> bool:
    """Whether a value names modules: by ends of their paths, or by a regular expression."""
    if isinstance(value, str):
        try:
            return bool(re.compile(value))
        except re.error:
            return False
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _ia3_side(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    named = config.get("feedforward_modules") or []
    if isinstance(named, str):
        return {"feedforward": re.fullmatch(named, path) is not None}
    return {"feedforward": path.endswith(tuple(named))}


def _ia3_sides(adapter: AdapterFile) -> Settings:
    """Whole paths, which PEFT takes for ends of paths; or a regular expression, where that would be too much."""
    layers = {path: layer for path, layer in adapter.layers.items() if layer.method == "ia3"}
    inputs = sorted(path for path, layer in layers.items() if layer.hyperparameters.get("feedforward"))
    others = layers.keys() - set(inputs)
    if any(path.endswith(tuple(inputs)) for path in others):
        return {"feedforward_modules": "|".join(map(re.escape, inputs))}
    return {"feedforward_modules": inputs}


def _hira_rank(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """That of the tensors, as PEFT may have heeded a pattern or not."""
    factors = [tensor for name, tensor in tensors.items() if name.endswith("_A")]
    return {"rank": len(factors[0])} if factors else {}


_HIRA_TENSORS = ("hira_A", "hira_B", "hira_embedding_A", "hira_embedding_B")
_GLORA_ENDS = {
    f"glora_{letter}_{tensor}": f"glora_{letter}.{tensor}"
    for letter in "ABCDE"
    for tensor in ("X", "Xd", "Xu", "zeros")
}

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
        "ia3",
        "IA3",
        settings={},
        tensors={"ia3_l": "ia3_l"},
        inert=frozenset({"init_ia3_weights"}),
        read={"feedforward_modules": _names_modules},
        of_layer=_ia3_side,
        of_file=_ia3_sides,
    ),
    Grammar(
        "road",
        "ROAD",
        settings={"variant": ("variant", "road_1"), "group_size": ("group_size", 64)},
        tensors={"road_theta": "road_theta", "road_alpha": "road_alpha"},
    ),
    Grammar(
        "glora",
        "GLORA",
        settings={
            "rank": ("r", 8),
            "config_a_b": ("config_A_B", "lora"),
            "config_c": ("config_C", "lora"),
            "config_d_e": ("config_D_E", "constant"),
        },
        tensors=_GLORA_ENDS,
        optional=frozenset(_GLORA_ENDS),
    ),
    Grammar(
        "hira",
        "HIRA",
        settings={"rank": ("r", 32)},
        tensors={name: name for name in _HIRA_TENSORS},
        optional=frozenset(_HIRA_TENSORS),
        inert=frozenset({"hira_dropout", "rank_pattern"}),  # PEFT heeds the pattern for second adapters only.
        of_layer=_hira_rank,
    ),
    Grammar(
        "delora",
        "DELORA",
        settings={"rank": ("r", 8), "boundary": ("delora_lambda", 15.0)},
        patterns={"rank": "rank_pattern", "boundary": "lambda_pattern"},
        tensors={name: name for name in ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")},
        inert=frozenset({"module_dropout"}),
    ),
)
"""Every method that PEFT's files can hold."""
