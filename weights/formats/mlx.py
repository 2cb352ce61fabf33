"""The format of mlx-lm: a folder with `adapter_config.json` and `adapters.safetensors`.

Tensors are named `<path>.lora_a`, `(in, rank)`, and `<path>.lora_b`, `(rank, out)`: the other way round than elsewhere.
DoRA has the lengths of the rows as `<path>.m`. The settings hold what the product of A and B is multiplied by, once
for all layers, as `scale`; there is no alpha.
Format: https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/LORA.md.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from weights.adapter_file import CONFIG, AdapterFile, LayerWeights
from weights.formats.common.format import Format, Match, refuse
from weights.formats.common.probe import Probe
from weights.formats.common.settings import is_number
from weights.formats.common.writing import Chunks, write_folder
from weights.methods.core.factors import missing, shape_mismatch
from weights.tensors.open import encode, open_tensors

TENSORS = "adapters.safetensors"
METHODS = frozenset({"lora", "dora"})
NAME = "mlx-lm"

_LENGTHS = "lora_magnitude_vector"
_ENDS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": _LENGTHS}
_NUMBERS = {"rank", "alpha", "dropout", "rslora", "bias", "on_inputs"}
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LARGEST_RANK = 2**31


def recognise(probe: Probe) -> Match:
    """SURE of a folder with both files, or one of them: training also leaves `0000100_adapters.safetensors`."""
    is_file = probe.path.name == CONFIG or probe.path.name.endswith(TENSORS)
    has_settings = bool(probe.config.keys() & {"lora_parameters", "fine_tune_type"})
    return Match.sure_if(has_settings and (is_file or (probe.path / TENSORS).is_file()))


def read(probe: Probe) -> AdapterFile:
    """Read a folder, or the file of tensors in one.

    Raises:
        SourceNotFoundError: There is no such file in the folder.
        FileFormatError: The files are not sound, contradict each other, or use what is not supported; the message
            lists the problems.
    """
    file = probe.path if probe.path.name.endswith(TENSORS) else probe.folder / TENSORS
    tensors = open_tensors(file)
    method = probe.config.get("fine_tune_type", "lora")
    if method not in ("lora", "dora"):
        refuse(file, NAME, [f"fine_tune_type is {method!r}, which is none of lora and dora"])
    rank, scale, dropout = _settings(probe)
    numbers = {"rank": rank, "alpha": scale * rank, "dropout": dropout, "rslora": False}
    named: dict[str, dict[str, Tensor]] = {}
    problems: list[str] = []
    for key in tensors:
        path, _, end = key.rpartition(".")
        if path and end in _ENDS:
            named.setdefault(path, {})[_ENDS[end]] = tensors[key]
        else:
            problems.append(f"the key {key!r} is not expected")
    layers: dict[str, LayerWeights] = {}
    for path, own in named.items():
        if problem := _problem(path, own, method, rank):
            problems.append(problem)
        else:
            layers[path] = _layer(path, own, method, numbers)
    refuse(file, NAME, problems or ([] if layers else ["it has no adapter in it"]))
    base = probe.config.get("model")
    return AdapterFile(layers, base if isinstance(base, str) and base else None, tensors.metadata)


def write(adapter: AdapterFile, path: Path) -> None:
    """Write a folder that mlx-lm loads: tensors, settings, and a model card unless there is a `README.md` already.

    Where layers differ in rank or in strength, zeros are added to the smaller factors, and B is multiplied by the rest
    of the scale.

    Raises:
        FileFormatError: The format cannot hold the adapter, or the path is that of a file.
        FileWriteError: The system refused to write.
    """
    if path.suffix == ".safetensors":
        refuse(path, NAME, ["its name is that of a file, and the adapters of mlx-lm are folders"])
    parts = {adapter.component_of(where)[0] for where in adapter.layers}
    if len(parts) > 1:
        refuse(path, NAME, [f"it is for several models, {', '.join(sorted(parts))}: write each part by itself"])
    layers = adapter.part(*parts).layers if parts else {}
    refuse(path, NAME, list(_problems(adapter, layers)))
    scales = Counter(map(_scale, layers.values()))
    scale = max(scales, key=lambda value: (value != 0, scales[value]))
    rank = max(_factors(layer)[0].shape[0] for layer in layers.values())
    tensors = {
        f"{where}.{end}": tensor
        for where, layer in layers.items()
        for end, tensor in _written(layer, rank, scale).items()
    }
    first = next(iter(layers.values()))
    # Keys are looked for in the whole model, as these whole paths are, and in so many of its last blocks.
    parameters = {"rank": rank, "scale": scale, "dropout": _dropout(first), "keys": sorted(layers)}
    settings = {"fine_tune_type": first.method, "num_layers": 0, "lora_parameters": parameters}
    settings |= {"model": adapter.base_model} if adapter.base_model else {}
    files: dict[str, Chunks] = {
        TENSORS: encode(tensors, {"format": "mlx"}),
        CONFIG: [(json.dumps(settings, indent=4, sort_keys=True) + "\n").encode()],
    }
    write_folder(path, files, adapter, "mlx")


# Reading


def _settings(probe: Probe) -> tuple[int, float, float]:
    """The rank, the scale and the dropout in the settings."""
    table = probe.config.get("lora_parameters")
    table = {"dropout": 0.0, "alpha": None, **(table if isinstance(table, dict) else {})}
    rank: Any = table.get("rank")
    problems = [] if type(rank) is int and 0 < rank < _LARGEST_RANK else [f"its rank is {rank!r}"]
    old: Any = rank if table["alpha"] is None else table["alpha"]
    numbers = {"scale": table.get("scale"), "dropout": table["dropout"], "alpha": old}
    problems += [f"its {name} is {value!r}" for name, value in numbers.items() if not is_number(value)]
    if old != rank and "lora_layers" not in probe.config:
        # Versions of 2024 multiplied the scale by alpha / rank, until alpha was dropped. The oldest have this name.
        problems.append(
            "it has an alpha, which some versions heed and others do not: remove it from the lora_parameters, or"
            " multiply the scale there by alpha / rank too"
        )
    refuse(probe.folder / CONFIG, NAME, problems)
    return rank, float(table["scale"] * old / rank), float(table["dropout"])


def _problem(path: str, tensors: Mapping[str, Tensor], method: str, rank: int) -> str | None:
    """The problem of the names or the shapes of the tensors of a layer."""
    keys = {name: f"{path}.{end}" for end, name in _ENDS.items()}
    absent = [key for name, key in keys.items() if name in _needed(method, "lora_") - tensors.keys()]
    if absent:
        return missing(keys[min(tensors)], *absent)
    problem = None
    if tensors.keys() != _needed(method, "lora_"):
        problem = f"{', '.join(sorted(tensors))}, which are not those of a {method}"
    elif tensors["lora_A"].ndim == tensors["lora_B"].ndim == 3:
        problem = "adapters of several experts, which are not supported"
    elif method == "dora" and _is_embedding(path):
        problem = "a DoRA of an embedding with a length for each row, which is not supported"
    names = ("lora_a", "lora_b")
    problem = problem or shape_mismatch(tensors["lora_A"], tensors["lora_B"], rank, names=names, axes=(1, 0), flat=True)
    return f"layer {path!r} has {problem}" if problem else None


def _layer(path: str, tensors: Mapping[str, Tensor], method: str, numbers: Mapping[str, Any]) -> LayerWeights:
    prefix = _prefix(_is_embedding(path))
    own = {f"{prefix}{end}": tensors[f"lora_{end}"].T.contiguous() for end in "AB"}
    own |= {name: tensor for name, tensor in tensors.items() if name == _LENGTHS}
    return LayerWeights(method, numbers, own)


def _is_embedding(path: str) -> bool:
    """Whether models call embeddings so; nothing else in a file tells them from linear layers."""
    name = path.rpartition(".")[2]
    return "embed" in name or name == "wte"


def _prefix(embedding: bool) -> str:
    return "lora_embedding_" if embedding else "lora_"


def _needed(method: str, prefix: str) -> set[str]:
    """The names of the tensors that a layer has."""
    return {f"{prefix}A", f"{prefix}B", *([_LENGTHS] if method == "dora" else [])}


# Writing


def _problems(adapter: AdapterFile, layers: Mapping[str, LayerWeights]) -> Iterator[str]:
    """The parts of an adapter that mlx-lm has no place for."""
    if adapter.flattened:
        yield "the paths of its layers are flattened: load it into the model, and save it from there"
    yield from (f"it has no place for {name}, which all layers share" for name in adapter.shared)
    unfit = [f"layer {where!r} has {part}" for where, layer in layers.items() if (part := _unfit(where, layer))]
    yield from unfit
    if not layers:
        yield "it has no layers with an adapter"
    elif not unfit and len({layer.method for layer in layers.values()}) > 1:
        yield "its layers differ in method, and mlx-lm keeps one"
    elif not unfit and len(set(map(_dropout, layers.values()))) > 1:
        yield "its layers differ in dropout, and mlx-lm keeps one"


def _unfit(where: str, layer: LayerWeights) -> str | None:
    """The part of a layer that mlx-lm has no place for."""
    numbers = layer.hyperparameters
    if layer.method not in METHODS:
        return f"the method {layer.method!r}, which is none of lora and dora"
    if any(numbers.get(name, False) is not False for name in ("bias", "on_inputs")) or not numbers.keys() <= _NUMBERS:
        return f"more than mlx-lm knows, in {', '.join(map(str, numbers))}"
    if not all(is_number(numbers.get(name, 0)) for name in ("alpha", "dropout")):
        return "an alpha or a dropout that is no number"
    embedding = "lora_embedding_A" in layer.tensors
    if layer.tensors.keys() != _needed(layer.method, _prefix(embedding)):
        return f"{', '.join(sorted(layer.tensors))}, which are not those of a {layer.method}"
    if not all(tensor.dtype in _DTYPES for tensor in layer.tensors.values()):
        return f"numbers of other types than {', '.join(map(str, _DTYPES))}"
    a, b = _factors(layer)
    if a.ndim != 2 or b.ndim != 2:
        return f"factors of {tuple(a.shape)} and {tuple(b.shape)}, and mlx-lm adapts linear layers and embeddings only"
    rank = numbers.get("rank")
    if problem := shape_mismatch(a, b, rank if type(rank) is int else 0, flat=True):
        return problem
    if embedding and layer.method == "dora":
        return "a DoRA of an embedding with a length for each feature, where mlx-lm has one for each row"
    if embedding != _is_embedding(where) or not where:
        return "a path by which it would not be known whether it is an embedding"
    return None


def _factors(layer: LayerWeights) -> tuple[Tensor, Tensor]:
    prefix = _prefix("lora_embedding_A" in layer.tensors)
    return layer.tensors[f"{prefix}A"], layer.tensors[f"{prefix}B"]


def _dropout(layer: LayerWeights) -> float:
    return cast(float, layer.hyperparameters.get("dropout", 0.0))


def _scale(layer: LayerWeights) -> float:
    numbers: Mapping[str, Any] = layer.hyperparameters
    rank = numbers["rank"]
    return float(numbers.get("alpha", rank) / (math.sqrt(rank) if numbers.get("rslora") else rank))


def _written(layer: LayerWeights, rank: int, scale: float) -> dict[str, Tensor]:
    """The tensors of a layer by the ends of their names, for a rank and a scale that may not be its own."""
    a, b = _factors(layer)
    if _scale(layer) != scale:  # In single precision, as halves would be rounded.
        b = b.to(torch.promote_types(b.dtype, torch.float32)) * (_scale(layer) / scale)
    if missing := rank - a.shape[0]:
        a = torch.cat([a, a.new_zeros(missing, a.shape[1])])
        b = torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1)
    return {"lora_a": a.T, "lora_b": b.T} | ({"m": layer.tensors[_LENGTHS]} if _LENGTHS in layer.tensors else {})


FORMAT = Format(recognise, read, write, METHODS, files=(CONFIG, TENSORS))
