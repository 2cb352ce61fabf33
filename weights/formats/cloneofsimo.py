"""The format of cloneofsimo/lora, the first for diffusion models: layers have numbers in place of names.

Tensors are named `<component>:<number>:up` and `:down`. The metadata has the component's name with a list, in JSON, of
the classes whose layers were counted, and the rank of each layer. The scale is 1. The embedding of a new token is a
tensor named as the token, which is `<embed>` in the metadata.
Source: https://github.com/cloneofsimo/lora/blob/master/lora_diffusion/lora.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.formats.found import Found
from weights.formats.keyed import refuse

FILES = ("final_lora.safetensors", "lora_weight.safetensors")
NAME = "cloneofsimo/lora"

_KEY = re.compile(r"(\w+):(0|[1-9]\d{0,5}):(up|down)", re.ASCII)
_ENDS = {"up": "lora_B", "down": "lora_A"}
_TOKEN = "<embed>"


def recognise(found: Found) -> bool:
    """Whether the file has a tensor that is named so."""
    return found.tensors is not None and any(map(_KEY.fullmatch, found.tensors))


def read(found: Found) -> AdapterFile:
    """Read a file.

    Raises:
        FileFormatError: The file is not sound, or has what is not expected in it; the message lists what is wrong.
    """
    file = found.open()
    named: dict[str, dict[str, Tensor]] = {}
    counted: dict[str, tuple[str, ...]] = {}
    others: dict[str, Tensor] = {}
    problems: list[str] = []
    for key in file:
        match = _KEY.fullmatch(key)
        if match is None:
            if file.metadata.get(key) == _TOKEN:
                others[key] = file[key]
            else:
                problems.append(f"the key {key!r} is not expected")
            continue
        component, number, end = match.groups()
        named.setdefault(f"{component}.{number}", {})[_ENDS[end]] = file[key]
        counted[component] = ()
    for component in counted:
        counted[component] = classes = _classes(file.metadata.get(component))
        problems += [] if classes else [f"its metadata does not say what layers of {component!r} were counted"]
    problems += [f"layer {path!r} has {what}" for path, tensors in named.items() if (what := _problem(tensors))]
    refuse(found.path, NAME, problems)
    layers = {path: _layer(tensors) for path, tensors in named.items()}
    components = tuple(sorted(counted))
    return AdapterFile(layers, metadata=file.metadata, components=components, counted=counted, others=others)


def _classes(text: str | None) -> tuple[str, ...]:
    """The names of classes in a text of JSON, none where it is something else."""
    try:
        names = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _problem(tensors: Mapping[str, Tensor]) -> str | None:
    """What is wrong with the two tensors of a layer."""
    if tensors.keys() != {"lora_A", "lora_B"}:
        return f"{', '.join(tensors)} instead of lora_A and lora_B"
    a, b = (tuple(tensors[name].shape) for name in ("lora_A", "lora_B"))
    if len(a) not in (2, 4) or len(a) != len(b) or b[2:] != (1,) * len(b[2:]) or not 0 < a[0] == b[1]:
        return f"a down of {a} and an up of {b}, which do not fit each other"
    return None


def _layer(tensors: Mapping[str, Tensor]) -> LayerWeights:
    rank = tensors["lora_A"].shape[0]
    return LayerWeights("lora", {"rank": rank, "alpha": float(rank), "dropout": 0.0, "rslora": False}, tensors)
