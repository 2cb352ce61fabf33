"""(IA)³'s tensors in foreign files: factors in PEFT's, the differences from 1 in LyCORIS's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from weights.adapter_file import AdapterFile, Hyperparameter, LayerWeights
from weights.methods.core.lycoris import LycorisLayout, Read, Tensors, Written, widened
from weights.methods.core.patterns import compiled
from weights.methods.core.peft import PeftLayout, Settings


def _names_modules(value: Any) -> bool:
    """Whether a value names modules: by ends of their paths, or by a regular expression."""
    if isinstance(value, str):
        try:
            return bool(compiled(value))
        except ValueError:
            return False
    return value is None or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _problem(layer: LayerWeights) -> str | None:
    """The problem of a layer that PEFT cannot compute."""
    numbers = layer.hyperparameters
    if numbers.get("feedforward") or numbers.get("bias", True):
        return None
    return "factors of the outputs that leave the bias as it is, where PEFT's do not"


def _of_layer(config: Settings, path: str, tensors: Mapping[str, Tensor]) -> Mapping[str, Hyperparameter]:
    named = config.get("feedforward_modules") or []
    if isinstance(named, str):
        return {"feedforward": re.fullmatch(named, path) is not None}
    return {"feedforward": path.endswith(tuple(named))}


def _of_file(adapter: AdapterFile) -> Settings:
    """Whole paths, which PEFT takes for ends of paths; or a regular expression, where that would be too much."""
    layers = {path: layer for path, layer in adapter.layers.items() if layer.method == "ia3"}
    inputs = sorted(path for path, layer in layers.items() if layer.hyperparameters.get("feedforward"))
    others = layers.keys() - set(inputs)
    if any(path.endswith(tuple(inputs)) for path in others):
        return {"feedforward_modules": "|".join(map(re.escape, inputs))}
    return {"feedforward_modules": inputs}


PEFT = PeftLayout(
    "ia3",
    "IA3",
    settings={},
    tensors={"ia3_l": "ia3_l"},
    inert=frozenset({"init_ia3_weights"}),
    read={"feedforward_modules": _names_modules},
    check=_problem,
    of_layer=_of_layer,
    of_file=_of_file,
)


def _read(tensors: Tensors, alpha: float | None) -> Read:
    """Factors from the differences. The bias of a layer is not multiplied."""
    on_input = bool(tensors.get("on_input", torch.tensor(0)).any())
    factors = 1 + widened(tensors["ia3_l"])
    if factors.ndim == 1:
        factors = factors.view(1, -1) if on_input else factors.view(-1, 1)
    return {"feedforward": True} if on_input else {"feedforward": False, "bias": False}, {"ia3_l": factors}


def _write(layer: LayerWeights) -> Written:
    on_input = bool(layer.hyperparameters.get("feedforward"))
    if not on_input and layer.hyperparameters.get("bias", True):
        raise ValueError("factors of the outputs and of the bias, which LyCORIS leaves as it is: train with bias=False")
    added = widened(layer.tensors["ia3_l"]) - 1
    return {"ia3_l": added.flatten() if added.ndim == 2 else added, "on_input": torch.tensor(int(on_input))}, None


LYCORIS = LycorisLayout(
    "ia3",
    sets=(frozenset({"ia3_l"}), frozenset({"ia3_l", "on_input"})),
    names={"ia3_l": "weight"},
    integers=frozenset({"on_input"}),
    read=_read,
    write=_write,
    has_alpha=False,
)
