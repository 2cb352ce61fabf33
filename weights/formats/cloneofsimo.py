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
from weights.formats.common.format import Format, Match, refuse
from weights.formats.common.probe import Probe
from weights.methods.core.factors import lone_factor, shape_mismatch

NAME = "cloneofsimo/lora"

_KEY = re.compile(r"(\w+):(0|[1-9]\d{0,5}):(up|down)", re.ASCII)
_ENDS = {"up": "lora_B", "down": "lora_A"}
_TOKEN = "<embed>"


def recognise(probe: Probe) -> Match:
    """SURE of a file with a tensor that is named so."""
    return Match.sure_if(any(map(_KEY.fullmatch, probe.tensors or ())))


def read(probe: Probe) -> AdapterFile:
    """Read a file.

    Raises:
        FileFormatError: The file is not sound, or has unexpected tensors; the message lists the problems.
    """
    file = probe.open()
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
        if problem := lone_factor(key, file):
            problems.append(problem)
        component, number, end = match.groups()
        named.setdefault(f"{component}.{number}", {})[_ENDS[end]] = file[key]
        counted[component] = ()
    for component in counted:
        counted[component] = classes = _classes(file.metadata.get(component))
        problems += [] if classes else [f"its metadata does not say what layers of {component!r} were counted"]
    problems += [f"layer {path!r} has {problem}" for path, own in named.items() if (problem := _problem(own))]
    refuse(probe.path, NAME, problems)
    layers = {path: _layer(tensors) for path, tensors in named.items()}
    components = tuple(sorted(counted))
    return AdapterFile(layers, metadata=file.metadata, components=components, counted=counted, others=others)


def _classes(text: str | None) -> tuple[str, ...]:
    """The names of classes in a JSON list, none where it is something else."""
    try:
        names = json.loads(text or "[]")
    except (ValueError, RecursionError):
        return ()
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _problem(tensors: Mapping[str, Tensor]) -> str | None:
    """The problem of the two tensors of a linear layer or a 2-D convolution."""
    if len(tensors) < 2:
        return None  # Said by its key.
    a, b = tensors["lora_A"], tensors["lora_B"]
    return shape_mismatch(a, b, names=("down", "up"), flat=a.ndim != 4)


def _layer(tensors: Mapping[str, Tensor]) -> LayerWeights:
    rank = tensors["lora_A"].shape[0]
    return LayerWeights("lora", {"rank": rank, "alpha": float(rank), "dropout": 0.0, "rslora": False}, tensors)


FORMAT = Format(recognise, read, files=("final_lora.safetensors", "lora_weight.safetensors"))
