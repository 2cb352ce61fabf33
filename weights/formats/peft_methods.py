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
        only: The pattern for a layer and, if it can be said, no other.
        tensors: For each tensor, the end of its name in the file.
        optional: Tensors that a layer may lack.
        shared: For each tensor that all layers have in common, its whole name in the file.
        shared_if: The setting that says whether those are in the file, by default true; None where they always are.
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
    only: Callable[[str], str] = lambda path: f"^{re.escape(path)}"
    optional: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_if: str | None = None
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
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


def _vblora_problem(layer: LayerWeights) -> str | None:
    """What is wrong with the names of the tensors."""
    only = layer.hyperparameters.get("only_topk")
    ends = ("_topk_indices", "_topk_weights") if only else ("",)
    needed = sorted(f"vblora_logits_{factor}{end}" for factor in "AB" for end in ends)
    have = ", ".join(sorted(layer.tensors))
    return None if have == ", ".join(needed) else f"{have} instead of {', '.join(needed)}"


def _after_dot(path: str) -> str:
    """A pattern for a layer, in settings of which PEFT matches patterns only after a dot and whole paths as they are.

    So where there is a dot, what is before it is looked back at.
    """
    head, dot, name = path.rpartition(".")
    return rf"(?<=^{re.escape(head)}\.){re.escape(name)}" if dot else path


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
_VBLORA_ENDS = {
    f"vblora_logits_{factor}{end}": f"vblora_logits_{factor}{end}"
    for factor in "AB"
    for end in ("", "_topk_indices", "_topk_weights")
}
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
        "fourierft",
        "FOURIERFT",
        settings={
            "n_frequency": ("n_frequency", 1000),
            "scaling": ("scaling", 150.0),
            "seed": ("random_loc_seed", 777),
        },
        patterns={"n_frequency": "n_frequency_pattern"},
        only=_after_dot,
        tensors={"fourierft_spectrum": "fourierft_spectrum"},
        # PEFT sorts the patterns when it saves them, which can make another one the first that matches.
        of_layer=lambda config, path, tensors: {"n_frequency": tensors["fourierft_spectrum"].shape[-1]},
    ),
    Grammar(
        "gralora",
        "GRALORA",
        settings={
            "rank": ("r", 32),
            "alpha": ("alpha", 64.0),
            "blocks": ("gralora_k", 2),
            "hybrid_rank": ("hybrid_r", 0),
        },
        tensors={
            "gralora_A": "gralora_A",
            "gralora_B": "gralora_B",
            "gralora_A_general": "gralora_A_general.weight",
            "gralora_B_general": "gralora_B_general.weight",
        },
        optional=frozenset({"gralora_A_general", "gralora_B_general"}),
        inert=frozenset({"gralora_dropout"}),
    ),
    Grammar(
        "randlora",
        "RANDLORA",
        settings={
            "rank": ("r", 32),
            "alpha": ("randlora_alpha", 640.0),
            "seed": ("projection_prng_key", 0),
            "sparse": ("sparse", False),
            "very_sparse": ("very_sparse", False),
        },
        tensors={"randlora_lambda": "randlora_lambda", "randlora_gamma": "randlora_gamma"},
        shared={"randlora_A": "base_model.randlora_A", "randlora_B": "base_model.randlora_B"},
        shared_if="save_projection",
        inert=frozenset({"randlora_dropout"}),
    ),
    Grammar(
        "shira",
        "SHIRA",
        settings={"rank": ("r", 32), "seed": ("random_seed", None)},
        tensors={"shira_weight": "shira_weight", "shira_indices": "shira_indices"},
        # How the entries were chosen: which they are is in the file.
        inert=frozenset({"mask_type"}),
    ),
    Grammar(
        "vblora",
        "VBLORA",
        settings={
            "rank": ("r", 4),
            "num_vectors": ("num_vectors", 256),
            "vector_length": ("vector_length", 256),
            "topk": ("topk", 2),
            "only_topk": ("save_only_topk_weights", False),
        },
        tensors=_VBLORA_ENDS,
        optional=frozenset(_VBLORA_ENDS),
        shared={"vblora_vector_bank": "base_model.vblora_vector_bank"},
        inert=frozenset({"init_logits_std", "init_vector_bank_bound", "vblora_dropout"}),
        check=_vblora_problem,
    ),
    Grammar(
        "vera",
        "VERA",
        settings={"rank": ("r", 256), "seed": ("projection_prng_key", 0), "d_initial": ("d_initial", 0.1)},
        tensors={"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
        shared={"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"},
        shared_if="save_projection",
        inert=frozenset({"vera_dropout"}),
    ),
)
"""Every method that PEFT's files can hold."""
