"""How PEFT writes each method: the type and the settings in the JSON file, and the ends of the tensors' names."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from weights.adapter_file import AdapterFile, Hyperparameter, LayerWeights
from weights.formats.patterns import compiled

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Grammar:
    """One method in the files of PEFT.

    Attributes:
        method: The key of the method.
        type: PEFT's name for it.
        settings: For each hyperparameter, its name in the JSON file and PEFT's default.
        patterns: For a hyperparameter that may differ between layers, the setting that says where.
        pattern: The pattern for a layer and, if it can be said, no other, as PEFT matches those of this method.
        tensors: For each tensor, the end of its name in the file.
        aliases: Other ends of names that are read, and the tensor that each stands for.
        optional: Tensors that a layer may lack.
        shared: For each tensor that all layers have in common, its whole name in the file.
        shared_if: The setting that says whether those are in the file, by default true; None where they always are.
        rooted: Whether there is one adapter for the whole model: its tensors have no path in their names.
        fixed: Settings that have to have one of these values, the first of which is written.
        whole: Whether its tensors are parameters of the layers, each in a place of its own, rather than adapters.
        inert: Settings that do not change what the saved tensors compute.
        read: Settings that only `of_layer` reads, each with what says whether a value is one that it can have.
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
    # PEFT also tries a pattern on the tail of a longer path; `^` keeps it to the whole path.
    pattern: Callable[[str], str] = lambda path: f"^{re.escape(path)}"
    aliases: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_if: str | None = None
    rooted: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    whole: bool = False
    inert: frozenset[str] = frozenset()
    read: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    check: Callable[[LayerWeights], str | None] = lambda layer: None
    of_layer: Callable[[Settings, str, Mapping[str, Tensor]], Mapping[str, Hyperparameter]] = lambda *_: {}
    of_file: Callable[[AdapterFile], Settings] = lambda adapter: {}
    written: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor

    @property
    def prefix(self) -> str:
        """What names of layers begin with in the file."""
        return "base_model." if self.rooted else "base_model.model."

    def key(self, path: str, name: str) -> str:
        """The name of a layer's tensor in the file."""
        if self.rooted:
            return self.tensors[name]
        if self.whole and name != "weight":
            path = path.removesuffix(f".{name}")
        return f"{self.prefix}{path}.{self.tensors[name]}"

    @cached_property
    def ends(self) -> Mapping[str, str]:
        """The tensor that each end of a name stands for, the longest end first."""
        ends = {**{end: name for name, end in self.tensors.items()}, **self.aliases}
        return dict(sorted(ends.items(), key=lambda item: -len(item[0])))


def _lora_problem(layer: LayerWeights) -> str | None:
    """What is wrong with the names or the shapes of A and B."""
    factors = sorted(name for name in layer.tensors if name.endswith(("_A", "_B")))
    if factors not in (["lora_A", "lora_B"], ["lora_embedding_A", "lora_embedding_B"]):
        return f"{', '.join(sorted(layer.tensors))} instead of lora_A and lora_B"
    a, b = (tuple(layer.tensors[name].shape) for name in factors)
    rank = layer.hyperparameters.get("rank")
    if len(a) == len(b) >= 2 and set(b[2:]) <= {1} and rank and a[0] == rank and b[1] == rank:
        return None
    return f"lora_A {a} and lora_B {b}, which do not fit each other and rank {rank}"


def _dora_problem(layer: LayerWeights) -> str | None:
    """What is wrong with A and B, or what PEFT does not have."""
    return (
        "lengths of the inputs, where PEFT has those of outputs"
        if layer.hyperparameters.get("on_inputs")
        else (_lora_problem(layer))
    )


def _lora_layer(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """The start that PEFT subtracts from the weight, and the rank where several patterns match."""
    found: dict[str, Hyperparameter] = {}
    start = config.get("init_lora_weights", True)
    if start in ("pissa", "olora") and "lora_embedding_A" not in tensors:  # Embeddings have none, whatever it says.
        found["init"] = start
    # PEFT sorts the patterns when it saves them, which can make another one the first that matches.
    if ranks := config["rank_pattern"].found(path):
        rank = next((len(tensor) for name, tensor in tensors.items() if name.endswith("_A")), 0)
        found |= {"rank": rank} if rank in ranks else {}
    return found


def _adalora_problem(layer: LayerWeights) -> str | None:
    """What is wrong with the rank and the shapes of A, B and E."""
    if _rank(layer) > _MOST_ROWS:
        return f"a rank of {_rank(layer)}, and PEFT lists which of these rows are left"
    a, b, e = (tuple(layer.tensors[name].shape) for name in ("lora_A", "lora_B", "lora_E"))
    if len(a) == len(b) == 2 and e == (a[0], 1) and b[1] == a[0]:
        return None
    return f"lora_A {a}, lora_B {b} and lora_E {e}, which do not fit each other"


def _adalora_rows(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """How many rows are left, where they are fewer, and PEFT's alpha for one that is not positive."""
    rank, rows = int(config["init_r"]), len(tensors.get("lora_E", ()))
    kept: Mapping[str, Hyperparameter] = {"kept": rows} if rows != rank else {}
    return kept if config["lora_alpha"] > 0 else {**kept, "alpha": float(rank)}


def _rank(layer: LayerWeights) -> int:
    rank = layer.hyperparameters.get("rank")
    return rank if isinstance(rank, int) else 0


def _rank_pattern(adapter: AdapterFile) -> Settings:
    """Which rows of each layer are left: PEFT only counts them, when it loads a file."""
    pattern = {
        f"{path}.lora_E": [row < len(layer.tensors["lora_E"]) for row in range(_rank(layer))]
        for path, layer in adapter.layers.items()
        if layer.method == "adalora"
    }
    return {"rank_pattern": None if all(map(all, pattern.values())) else pattern}


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
    return {"task_type": adapter.task, "token_dim": width // (2 * layers) if isinstance(layers, int) else width}


def _prefix_problem(layer: LayerWeights) -> str | None:
    """What is wrong with the shape of the virtual tokens, or with the number of layers."""
    layers = layer.hyperparameters.get("num_layers")
    if isinstance(layers, int) and layers < 1:
        return f"a prefix for {layers} layers"
    return _virtual_problem(layer)


_MOST_ROWS = 2**16  # Far more than any adapter has.
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


def _oft_blocks(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """The block size of a layer: where neither setting divides the features, PEFT takes what comes near to it."""
    blocks, elements = (next(iter(tensors.values())).shape[at] for at in (0, -1))
    size = (1 + math.isqrt(1 + 8 * elements)) // 2
    told = blocks == config["r"] or config["block_share"] if config["r"] else size == config["oft_block_size"]
    return {} if told else {"blocks": 0, "block_size": size}


def _oft_problem(layer: LayerWeights) -> str | None:
    if layer.hyperparameters.get("of_weight"):
        return "a rotation that depends on whether it is a convolution: load it into the model, and save it from there"
    names = ", ".join(layer.tensors)
    (tensor, *others) = layer.tensors.values()
    return f"{names} of {tuple(tensor.shape)}, not one matrix" if others or tensor.ndim != 2 else None


def _boft_factors(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """The number of factors: without a compiler for its kernel, PEFT makes one, whatever the settings say."""
    return {"factors": len(tensors["boft_R"])}


def _miss_settings(adapter: AdapterFile) -> Settings:
    mini = any(layer.hyperparameters.get("mini_r") for layer in adapter.layers.values())
    return {"init_weights": "mini"} if mini else {"mini_r": 1}


def _names_modules(value: Any) -> bool:
    """Whether a value names modules: by ends of their paths, or by a regular expression."""
    if isinstance(value, str):
        try:
            return bool(compiled(value))
        except ValueError:
            return False
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _ia3_problem(layer: LayerWeights) -> str | None:
    """What PEFT's adapter of a layer cannot do."""
    numbers = layer.hyperparameters
    if numbers.get("feedforward") or numbers.get("bias", True):
        return None
    return "factors of the outputs that leave the bias as it is, where PEFT's do not"


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

_LOHA_FACTORS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
_LOKR_TENSORS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
_LYCORIS_SETTINGS = {
    "rank": ("r", 8),
    "alpha": ("alpha", 8.0),
    "tucker": ("use_effective_conv2d", False),
}
_LYCORIS_INERT = frozenset({"module_dropout", "rank_dropout", "rank_dropout_scale"})

_NORM_ENDS = {
    name: f"ln_tuning_layers.{name}"
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}


def _tokens_problem(layer: LayerWeights) -> str | None:
    rows, tokens = layer.tensors["trainable_tokens_delta"], layer.hyperparameters.get("tokens")
    if rows.ndim == 2 and isinstance(tokens, tuple) and len(rows) == len(tokens):
        return None
    return f"rows of the shape {tuple(rows.shape)}, which are not one for each of the tokens {tokens}"


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
        of_layer=_lora_layer,
    ),
    Grammar(
        "oft",
        "OFT",
        settings={
            "block_size": ("oft_block_size", 32),
            "blocks": ("r", 0),
            "coft": ("coft", False),
            "eps": ("eps", 6e-5),
            "block_share": ("block_share", False),
            "cayley_neumann": ("use_cayley_neumann", True),
            "num_terms": ("num_cayley_neumann_terms", 5),
        },
        tensors={"oft_R": "oft_R.weight", "oft_embedding_R": "oft_embedding_R.weight"},
        optional=frozenset({"oft_R", "oft_embedding_R"}),
        inert=frozenset({"module_dropout"}),
        check=_oft_problem,
        of_layer=_oft_blocks,
        of_file=lambda adapter: {"peft_version": "0.18.0"},  # From then on the series ends as it does here.
    ),
    Grammar(
        "boft",
        "BOFT",
        settings={
            "block_size": ("boft_block_size", 4),
            "blocks": ("boft_block_num", 0),
            "factors": ("boft_n_butterfly_factor", 1),
        },
        tensors={"boft_R": "boft_R", "boft_s": "boft_s"},
        inert=frozenset({"boft_dropout"}),
        of_layer=_boft_factors,
    ),
    Grammar(
        "hra",
        "HRA",
        settings={"rank": ("r", 8), "gram_schmidt": ("apply_GS", False)},
        tensors={"hra_u": "hra_u"},
    ),
    Grammar(
        "c3a",
        "C3A",
        settings={"block_size": ("block_size", 256)},
        patterns={"block_size": "block_size_pattern"},
        pattern=str,
        tensors={"c3a_kernel": "c3a_kernel"},
        of_layer=lambda config, path, tensors: {"block_size": tensors["c3a_kernel"].shape[-1]},
    ),
    Grammar(
        "miss",
        "MISS",
        settings={"rank": ("r", 64), "mini_r": ("mini_r", 1)},
        tensors={"miss_block": "miss_block"},
        fixed={"init_weights": (True, False, "mini")},
        inert=frozenset({"miss_dropout"}),
        of_layer=lambda config, *_: {} if config.get("init_weights") == "mini" else {"mini_r": 0},
        of_file=_miss_settings,
    ),
    Grammar(
        "bat",
        "MISS",
        settings={"rank": ("r", 64)},
        tensors={"miss_block": "miss_block"},
        fixed={"init_weights": ("bat",)},
        inert=frozenset({"miss_dropout", "mini_r"}),
    ),
    Grammar(
        "ia3",
        "IA3",
        settings={},
        tensors={"ia3_l": "ia3_l"},
        inert=frozenset({"init_ia3_weights"}),
        read={"feedforward_modules": _names_modules},
        check=_ia3_problem,
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
    Grammar(
        "fourierft",
        "FOURIERFT",
        settings={
            "n_frequency": ("n_frequency", 1000),
            "scaling": ("scaling", 150.0),
            "seed": ("random_loc_seed", 777),
        },
        patterns={"n_frequency": "n_frequency_pattern"},
        pattern=_after_dot,
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
        check=_dora_problem,
        of_layer=_lora_layer,
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
    Grammar(
        "norm",
        "LN_TUNING",
        settings={},
        tensors=_NORM_ENDS,
        optional=frozenset(_NORM_ENDS),
        whole=True,
    ),
    Grammar(
        "trainable_tokens",
        "TRAINABLE_TOKENS",
        settings={"tokens": ("token_indices", ())},
        tensors={"trainable_tokens_delta": "trainable_tokens_delta"},
        check=_tokens_problem,
    ),
    Grammar(
        "prompt_tuning",
        "PROMPT_TUNING",
        settings={"num_virtual_tokens": ("num_virtual_tokens", 0)},
        tensors={"prompt_embeddings": "prompt_embeddings"},
        rooted=True,
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
        rooted=True,
        fixed={"num_transformer_submodules": (1,)},
        # Files hold what the network of a projection makes, and nothing of the network.
        inert=frozenset({"encoder_hidden_size", "prefix_projection", "token_dim"}),
        check=_prefix_problem,
        of_file=_of_prefix,
    ),
)
"""Every method that PEFT's files can hold."""
