"""The format of torchtune's own adapters: tensors named `<path>.lora_a.weight`, with torchtune's names of layers.

torchtune saves a pickle, `adapter_model.pt`; read here are its tensors in a safetensors file, with the
`adapter_config.json` beside it that torchtune writes too. Its export for PEFT, with the names of transformers' layers,
is an ordinary PEFT folder.
Source: https://github.com/pytorch/torchtune/blob/main/torchtune/modules/peft/lora.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weights.adapter_file import CONFIG, AdapterFile, LayerWeights
from weights.formats.common.format import Format, Match, refuse
from weights.formats.common.probe import Probe
from weights.formats.common.settings import is_number
from weights.methods.core.factors import missing, shape_mismatch

NAME = "torchtune"

_ENDS = {".lora_a.weight": "lora_A", ".lora_b.weight": "lora_B", ".magnitude": "lora_magnitude_vector"}


def recognise(probe: Probe) -> Match:
    """SURE of a file with a tensor that is named so."""
    return Match.sure_if(any(key.endswith(".lora_a.weight") for key in probe.tensors or ()))


def read(probe: Probe) -> AdapterFile:
    """Read a file and the settings beside it.

    Raises:
        FileFormatError: The file is not sound, there are no settings beside it, or it uses what is not supported; the
            message lists the problems.
    """
    tensors = probe.open()
    rank: Any = probe.config.get("r")
    alpha: Any = probe.config.get("lora_alpha")
    base = probe.config.get("base_model_name_or_path")
    problems = [] if type(rank) is int and rank > 0 else [f"r is {rank!r} in the {CONFIG} beside it"]
    problems += [] if is_number(alpha) else [f"lora_alpha is {alpha!r} in the {CONFIG} beside it"]
    named: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None or key == end:
            problems.append(f"the key {key!r} is not expected")
        else:
            named.setdefault(key.removesuffix(end), {})[_ENDS[end]] = tensors[key]
    problems += [problem for path, own in named.items() if (problem := _problem(path, own, rank))]
    refuse(probe.path, NAME, problems)
    layers = {
        path: LayerWeights(
            "dora" if "lora_magnitude_vector" in own else "lora",
            {"rank": rank, "alpha": float(alpha), "dropout": 0.0, "rslora": False},
            own,
        )
        for path, own in named.items()
    }
    return AdapterFile(layers, base if isinstance(base, str) and base else None, tensors.metadata)


def _problem(path: str, tensors: dict[str, Tensor], rank: object) -> str | None:
    """The problem of the names or the shapes of the tensors of a layer."""
    keys = {name: f"{path}{end}" for end, name in _ENDS.items()}
    absent = [keys[name] for name in ("lora_A", "lora_B") if name not in tensors]
    if absent:
        return missing(keys[min(tensors)], *absent)
    problem = shape_mismatch(tensors["lora_A"], tensors["lora_B"], rank, names=("lora_a", "lora_b"), flat=True)
    return f"layer {path!r} has {problem}" if problem else None


FORMAT = Format(recognise, read, files=(CONFIG,))
