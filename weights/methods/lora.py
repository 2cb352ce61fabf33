"""LoRA's tensors in foreign files."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from weights.adapter_file import Hyperparameter, LayerWeights
from weights.methods.core.factors import shape_mismatch
from weights.methods.core.lycoris import (
    LycorisLayout,
    Read,
    Tensors,
    Written,
    alpha_or_rank,
    number,
    widened,
    with_alpha,
)
from weights.methods.core.peft import RANK_AND_ALPHA_PATTERNS, PeftLayout, Settings
from weights.methods.core.rows import RowAxes

# A core and a factor make a tensor of the product of their sizes, which must not be out of proportion to the file.
_LARGEST_KERNEL = 4096

# PEFT


def peft_problem(layer: LayerWeights) -> str | None:
    """The problem of A and B: their names, or a shape mismatch."""
    factors = sorted(name for name in layer.tensors if name.endswith(("_A", "_B")))
    if factors not in (["lora_A", "lora_B"], ["lora_embedding_A", "lora_embedding_B"]):
        return f"{', '.join(sorted(layer.tensors))} instead of lora_A and lora_B"
    a, b = (layer.tensors[name] for name in factors)
    return shape_mismatch(a, b, layer.hyperparameters.get("rank") or 0)


def _of_layer(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """The initialisation that PEFT subtracts from the weight, and the rank where several patterns match."""
    found: dict[str, Hyperparameter] = {}
    init = config.get("init_lora_weights", True)
    if init in ("pissa", "olora") and "lora_embedding_A" not in tensors:  # Embeddings have none, whatever it says.
        found["init"] = init
    # PEFT sorts the patterns when it saves them, which can make another one the first that matches.
    if ranks := config["rank_pattern"].found(path):
        rank = next((len(tensor) for name, tensor in tensors.items() if name.endswith("_A")), 0)
        found |= {"rank": rank} if rank in ranks else {}
    return found


_ENDS = {
    "lora_A": "lora_A.weight",
    "lora_B": "lora_B.weight",
    "lora_B.bias": "lora_B.bias",
    "lora_embedding_A": "lora_embedding_A",
    "lora_embedding_B": "lora_embedding_B",
}
# The other initialisations change the base model's weights too when PEFT loads the file.
_INITS = (True, False, "gaussian", "eva", "orthogonal", "pissa", "olora")
# How the tensors were found and trained: it does not change what they compute.
PEFT_INERT = frozenset(
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

PEFT = PeftLayout(
    "lora",
    "LORA",
    settings={
        "rank": ("r", 8),
        "alpha": ("lora_alpha", 8.0),
        "dropout": ("lora_dropout", 0.0),
        "rslora": ("use_rslora", False),
        "bias": ("lora_bias", False),
    },
    patterns=RANK_AND_ALPHA_PATTERNS,
    tensors=_ENDS,
    optional=frozenset(_ENDS),
    pairs=(("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")),
    fixed={"use_dora": (False,), "init_lora_weights": _INITS},
    biases=True,
    tokens=True,
    inert=PEFT_INERT,
    check=peft_problem,
    of_layer=_of_layer,
)

# LyCORIS


def read(tensors: Tensors, alpha: float | None) -> Read:
    """Hyperparameters and factors; a core between them goes into A."""
    down, up = tensors["lora_A"], tensors["lora_B"]
    core = tensors.get("lora_mid")
    rank = down.shape[0]
    if core is not None:
        if core.shape[:2] != (rank, rank) or math.prod(core.shape[2:]) > _LARGEST_KERNEL:
            raise ValueError(f"a lora_mid {tuple(core.shape)} that does not fit rank {rank}")
        # Each position of the kernel has its own mixture of the rows of A: as if A had been a convolution.
        down = torch.einsum("pq...,qc->pc...", widened(core), widened(down.flatten(1)))
    return {"rank": rank, "alpha": alpha_or_rank(alpha, rank)}, {"lora_A": down, "lora_B": up}


def _read_biased(tensors: Tensors, alpha: float | None) -> Read:
    hyperparameters, factors = read(tensors, alpha)
    return {**hyperparameters, "bias": True}, {**factors, "lora_B.bias": tensors["lora_B.bias"]}


def write(layer: LayerWeights) -> Written:
    """Tensors and alpha."""
    a, b = layer.tensors["lora_A"], layer.tensors["lora_B"]
    # B may be linear where A is a convolution, and the reverse.
    trailing = [1] * (a.ndim - 2) if set(b.shape[2:]) <= {1} else b.shape[2:]
    if problem := shape_mismatch(a, b.reshape(*b.shape[:2], *trailing), layer.hyperparameters.get("rank") or 0):
        raise ValueError(problem)
    tensors, alpha = with_alpha(layer, "lora_B")
    # There is no word for rsLoRA: the alpha of plain LoRA says as much.
    is_rslora = alpha and layer.hyperparameters.get("rslora")
    return tensors, alpha * math.sqrt(number(layer, "rank")) if alpha and is_rslora else alpha


NAMES = {
    "lora_A": "lora_down.weight",
    "lora_B": "lora_up.weight",
    "lora_mid": "lora_mid.weight",
    "lora_magnitude_vector": "dora_scale",
    "lora_B.bias": "lora_up.bias",
}
_SPELLINGS = {
    **{
        f"lora_{end}.weight": (
            f"lora_{letter}",
            f"lora_{letter}.weight",
            f"lora_{letter}.default.weight",
            f"lora.{end}.weight",
            f"lora_linear_layer.{end}.weight",
        )
        for end, letter in (("down", "A"), ("up", "B"))
    },
    "lora_up.bias": ("lora_B.bias", "lora_B.default.bias"),
}

LYCORIS = (
    LycorisLayout(
        "lora",
        sets=(frozenset({"lora_A", "lora_B"}), frozenset({"lora_A", "lora_B", "lora_mid"})),
        names=NAMES,
        spellings=_SPELLINGS,
        read=read,
        write=write,
    ),
    LycorisLayout(
        "lora",
        sets=(frozenset({"lora_A", "lora_B", "lora_B.bias"}),),
        names=NAMES,
        vectors=frozenset({"lora_B.bias"}),
        read=_read_biased,
        write=None,
    ),
)

# Rows


def own_rank(layer: LayerWeights, parts: int) -> LayerWeights:
    """One of several parts of a layer, without the ranks of the others if each has its own."""
    a, b = layer.tensors.get("lora_A"), layer.tensors.get("lora_B")
    rank, alpha = layer.hyperparameters.get("rank"), layer.hyperparameters.get("alpha")
    if a is None or b is None or not isinstance(rank, int) or not isinstance(alpha, int | float):
        return layer
    if parts < 2 or b.ndim < 2 or not len(a) == b.shape[1] == rank or rank % parts:
        return layer
    own = rank // parts
    used = [block for block, columns in enumerate(b.split(own, 1)) if columns.bool().any()]
    if len(used) != 1:
        return layer
    ranks = slice(used[0] * own, (used[0] + 1) * own)
    fewer = math.sqrt(parts) if layer.hyperparameters.get("rslora") else parts
    hyperparameters: dict[str, Hyperparameter] = {**layer.hyperparameters, "rank": own, "alpha": alpha / fewer}
    tensors: dict[str, Tensor] = {**layer.tensors, "lora_A": a[ranks].clone(), "lora_B": b[:, ranks].clone()}
    return LayerWeights(layer.method, hyperparameters, tensors)


ROWS = RowAxes("lora", by_row="lora_B lora_B.bias", common="lora_A", own_rank=own_rank)
