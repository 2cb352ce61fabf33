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
        fixed: Settings that have to have one of these values, the first of which is written.
        inert: Settings that do not change what the saved tensors compute.
        check: Says what is wrong with a layer besides missing tensors, or None.
        of_layer: What else the settings say of a layer: takes its path and its tensors.
        of_file: What else the settings have to say of an adapter.
        written: The shape that PEFT gives a tensor, by its name.
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
    check: Callable[[LayerWeights], str | None] = lambda layer: None
    of_layer: Callable[[Settings, str, Mapping[str, Tensor]], Mapping[str, Hyperparameter]] = lambda *_: {}
    of_file: Callable[[AdapterFile], Settings] = lambda adapter: {}
    written: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor

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


def _loha_problem(layer: LayerWeights) -> str | None:
    """What is wrong with the cores."""
    if ("hada_t1" in layer.tensors) != ("hada_t2" in layer.tensors):
        return "only one of hada_t1 and hada_t2"
    return None


def _lokr_problem(layer: LayerWeights) -> str | None:
    """What is wrong with the names or the shapes of the factors."""
    decomposed = {"lokr_w2_a", "lokr_w2_b"}
    firsts: tuple[set[str], ...] = ({"lokr_w1"}, {"lokr_w1_a", "lokr_w1_b"})
    seconds: tuple[set[str], ...] = ({"lokr_w2"}, decomposed, {*decomposed, "lokr_t2"})
    if layer.tensors.keys() not in [first | second for first in firsts for second in seconds]:
        return f"{', '.join(sorted(layer.tensors))}, which are not two factors"
    if "lokr_w2" in layer.tensors and layer.tensors["lokr_w2"].ndim == 3:
        return "a whole second factor of a Conv1d, for which PEFT multiplies the factors in the wrong order"
    return None


def _with_two_positions(name: str, tensor: Tensor) -> Tensor:
    """The kernel of a core has two dimensions, also that of a Conv1d."""
    return tensor.unsqueeze(-1) if name in ("hada_t1", "hada_t2", "lokr_t2") and tensor.ndim == 3 else tensor


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

_LOHA_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR_TENSORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_LYCORIS_SETTINGS = {
    "rank": ("r", 8),
    "alpha": ("alpha", 8.0),
    "tucker": ("use_effective_conv2d", False),
}
_LYCORIS_INERT = frozenset({"module_dropout", "rank_dropout", "rank_dropout_scale"})

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
        "loha",
        "LOHA",
        settings=_LYCORIS_SETTINGS,
        patterns=_RANKS_AND_ALPHAS,
        tensors={name: name for name in (*_LOHA_FACTORS, "hada_t1", "hada_t2")},
        optional=frozenset({"hada_t1", "hada_t2"}),
        inert=_LYCORIS_INERT,
        check=_loha_problem,
        written=_with_two_positions,
    ),
    Grammar(
        "lokr",
        "LOKR",
        settings={
            **_LYCORIS_SETTINGS,
            "factor": ("decompose_factor", -1),
            "decompose_both": ("decompose_both", False),
        },
        patterns=_RANKS_AND_ALPHAS,
        tensors={name: name for name in _LOKR_TENSORS},
        optional=frozenset(_LOKR_TENSORS),
        inert=_LYCORIS_INERT,
        check=_lokr_problem,
        written=_with_two_positions,
    ),
)
"""Every method that PEFT's files can hold."""
