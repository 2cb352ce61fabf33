"""The format of torchtune's own adapters: tensors named `<path>.lora_a.weight`, with torchtune's names of layers.

torchtune saves it as a pickle, `adapter_model.pt`; what is read here are these tensors in a safetensors file, with the
`adapter_config.json` beside it that torchtune writes too. Its export for PEFT, with the names of transformers' layers,
is an ordinary PEFT folder.
Source: https://github.com/pytorch/torchtune/blob/main/torchtune/modules/peft/lora.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from weights.adapter_file import CONFIG, AdapterFile, LayerWeights
from weights.formats.found import Found, is_number
from weights.formats.keyed import refuse

FILES = (CONFIG,)
NAME = "torchtune"

_ENDS = {".lora_a.weight": "lora_A", ".lora_b.weight": "lora_B", ".magnitude": "lora_magnitude_vector"}


def recognise(found: Found) -> bool:
    """Whether the file has a tensor that is named so."""
    return found.tensors is not None and any(key.endswith(".lora_a.weight") for key in found.tensors)


def read(found: Found) -> AdapterFile:
    """Read a file and the settings beside it.

    Raises:
        FileFormatError: The file is not sound, there are no settings beside it, or it uses what is not supported; the
            message lists what is wrong.
    """
    tensors = found.open()
    rank: Any = found.config.get("r")
    alpha: Any = found.config.get("lora_alpha")
    base = found.config.get("base_model_name_or_path")
    problems = [] if type(rank) is int and rank > 0 else [f"r is {rank!r} in the {CONFIG} beside it"]
    problems += [] if is_number(alpha) else [f"lora_alpha is {alpha!r} in the {CONFIG} beside it"]
    named: dict[str, dict[str, Tensor]] = {}
    for key in tensors:
        end = next((end for end in _ENDS if key.endswith(end)), None)
        if end is None or key == end:
            problems.append(f"the key {key!r} is not expected")
        else:
            named.setdefault(key.removesuffix(end), {})[_ENDS[end]] = tensors[key]
    problems += [f"layer {path!r} has {what}" for path, own in named.items() if (what := _problem(own, rank))]
    refuse(found.path, NAME, problems)
    layers = {
        path: LayerWeights(
            "dora" if "lora_magnitude_vector" in own else "lora",
            {"rank": rank, "alpha": float(alpha), "dropout": 0.0, "rslora": False},
            own,
        )
        for path, own in named.items()
    }
    return AdapterFile(layers, base if isinstance(base, str) and base else None, tensors.metadata)


def _problem(tensors: dict[str, Tensor], rank: object) -> str | None:
    """What is wrong with the names or the shapes of the tensors of a layer."""
    if not {"lora_A", "lora_B"} <= tensors.keys():
        return f"{', '.join(sorted(tensors))} instead of lora_A and lora_B"
    a, b = tuple(tensors["lora_A"].shape), tuple(tensors["lora_B"].shape)
    if len(a) != 2 or len(b) != 2 or a[0] != rank or b[1] != rank:
        return f"lora_a {a} and lora_b {b}, which do not fit each other and rank {rank}"
    return None
