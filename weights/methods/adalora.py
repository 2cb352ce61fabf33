"""AdaLoRA's tensors in foreign files."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from weights.adapter_file import AdapterFile, Hyperparameter, LayerWeights
from weights.methods import lora
from weights.methods.core.factors import shape_mismatch
from weights.methods.core.peft import PeftLayout, Settings, rank_of

_MOST_ROWS = 2**16  # Far more than any adapter has.


def _problem(layer: LayerWeights) -> str | None:
    """The problem of the rank, or a shape mismatch of A, B and E."""
    if rank_of(layer) > _MOST_ROWS:
        return f"a rank of {rank_of(layer)}, and PEFT lists which of these rows are left"
    a, b, e = (layer.tensors[name] for name in ("lora_A", "lora_B", "lora_E"))
    if e.shape != (*a.shape[:1], 1):
        return f"lora_A {tuple(a.shape)} and lora_E {tuple(e.shape)}, a shape mismatch"
    return shape_mismatch(a, b, flat=True, least=0)


def _of_layer(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    """The number of rows that are left, where they are fewer, and PEFT's alpha for one that is not positive."""
    rank, rows = int(config["init_r"]), len(tensors.get("lora_E", ()))
    kept: Mapping[str, Hyperparameter] = {"kept": rows} if rows != rank else {}
    return kept if config["lora_alpha"] > 0 else {**kept, "alpha": float(rank)}


def _of_file(adapter: AdapterFile) -> Settings:
    """The rows of each layer that are left: PEFT only counts them when it loads a file. It wants a number of steps."""
    pattern = {
        f"{path}.lora_E": [row < len(layer.tensors["lora_E"]) for row in range(rank_of(layer))]
        for path, layer in adapter.layers.items()
        if layer.method == "adalora"
    }
    return {"total_step": 1, "rank_pattern": None if all(map(all, pattern.values())) else pattern}


# The schedule of the ranks, and what PEFT's AdaLoRA takes over from its LoRA and does not use.
_INERT = frozenset(
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

PEFT = PeftLayout(
    "adalora",
    "ADALORA",
    settings={"rank": ("init_r", 12), "alpha": ("lora_alpha", 8.0), "dropout": ("lora_dropout", 0.0)},
    tensors={name: name for name in ("lora_A", "lora_B", "lora_E")},
    fixed={"use_dora": (False,), "lora_bias": (False,)},
    inert=lora.PEFT_INERT | _INERT,
    check=_problem,
    of_layer=_of_layer,
    of_file=_of_file,
)
