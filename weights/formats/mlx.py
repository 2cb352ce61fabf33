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
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.atomic import write_files
from weights.card import model_card
from weights.files import encode, open_tensors
from weights.formats.found import CONFIG, Found, is_number
from weights.formats.keyed import refuse

TENSORS = "adapters.safetensors"
CARD = "README.md"
FILES = (CONFIG, TENSORS)
METHODS = frozenset({"lora", "dora"})
NAME = "mlx-lm"

_ENDS = {"lora_a": "lora_A", "lora_b": "lora_B", "m": "lora_magnitude_vector"}
_NUMBERS = {"rank", "alpha", "dropout", "rslora", "bias"}


def recognise(found: Found) -> bool:
    """Whether it is a folder with both files, or one of them; training also leaves others, `..._adapters.safetensors`."""
    is_file = found.path.name == CONFIG or found.path.name.endswith(TENSORS)
    return bool(found.config.keys() & {"lora_parameters", "fine_tune_type"}) and (
        is_file or (found.path / TENSORS).is_file()
    )


def read(found: Found) -> AdapterFile:
    """Read a folder, or the file of tensors in one.

    Raises:
        SourceNotFoundError: There is no such file in the folder.
        FileFormatError: The files are not sound, contradict each other, or use what is not supported; the message
            lists what is wrong.
    """
    file = found.path if found.path.name.endswith(TENSORS) else found.folder / TENSORS
    tensors = open_tensors(file)
    method = found.config.get("fine_tune_type", "lora")
    if method not in ("lora", "dora"):
        refuse(file, NAME, [f"fine_tune_type is {method!r}, which is none of lora and dora"])
    rank, scale, dropout = _settings(found)
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
            problems.append(f"layer {path!r} has {problem}")
        numbers = {"rank": rank, "alpha": scale * rank, "dropout": dropout, "rslora": False}
        layers[path] = LayerWeights(
            method, numbers, _turned(own, "lora_embedding_" if _is_embedding(path) else "lora_")
        )
    refuse(file, NAME, problems or ([] if layers else ["it has no adapter in it"]))
    base = found.config.get("model")
    return AdapterFile(layers, base if isinstance(base, str) and base else None, tensors.metadata)


def write(adapter: AdapterFile, path: Path) -> None:
    """Write a folder that mlx-lm loads: tensors, settings, and a model card unless there is a `README.md` already.

    Where layers differ in rank or in strength, zeros are added to the smaller factors, and B is multiplied by what
    the one `scale` is not.

    Raises:
        FileFormatError: The format cannot hold the adapter, or the path is that of a file.
        FileWriteError: The system refused to write.
    """
    parts = {adapter.component_of(where)[0] for where in adapter.layers}
    problems = ["its name is that of a file, and its adapters are folders"] if path.suffix == ".safetensors" else []
    problems += ["the paths of its layers are flattened: load it into the model first"] * adapter.flattened
    problems += [f"it is for several models, {', '.join(sorted(parts))}"] * (len(parts) > 1)
    problems += [f"it has no place for {name}, which all layers share" for name in adapter.shared]
    layers = adapter.part(*parts).layers if len(parts) == 1 else adapter.layers
    problems += [f"layer {where!r} has {what}" for where, one in layers.items() if (what := _unfit(where, one))]
    refuse(path, NAME, problems)
    for name, of in (
        ("method", lambda one: one.method),
        ("dropout", lambda one: one.hyperparameters.get("dropout", 0)),
    ):
        values = {of(one) for one in layers.values()}
        refuse(path, NAME, [f"its layers differ in {name}, and it keeps one"] if len(values) > 1 else [])
    refuse(path, NAME, [] if layers else ["it has no layers with an adapter"])
    scales = Counter(map(_scale, layers.values()))
    scale = max(scales, key=lambda value: (value != 0, scales[value]))
    rank = max(_factors(one)[0].shape[0] for one in layers.values())
    tensors: dict[str, Tensor] = {}
    for where, layer in layers.items():
        tensors |= {f"{where}.{end}": tensor for end, tensor in _written(layer, rank, scale).items()}
    (method,) = {layer.method for layer in layers.values()}
    dropout = next(iter(layers.values())).hyperparameters.get("dropout", 0.0)
    # Whole paths as keys are looked for in the whole model; other keys would be, in so many of its last blocks.
    parameters = {"rank": rank, "scale": scale, "dropout": dropout, "keys": sorted(layers)}
    settings = {"fine_tune_type": method, "num_layers": 0, "lora_parameters": parameters}
    settings |= {"model": adapter.base_model} if adapter.base_model else {}
    contents: dict[Path, Iterable[bytes | memoryview]] = {
        path / TENSORS: encode(tensors, {"format": "mlx"}),
        path / CONFIG: [(json.dumps(settings, indent=4, sort_keys=True) + "\n").encode()],
    }
    if not (path / CARD).exists():  # Somebody may have written it by hand.
        contents[path / CARD] = [model_card(adapter, peft=False).encode()]
    write_files(contents)


# Reading


def _settings(found: Found) -> tuple[int, float, float]:
    """The rank, the scale and the dropout that the settings say."""
    table = found.config.get("lora_parameters")
    table = table if isinstance(table, dict) else {}
    rank, scale, dropout = table.get("rank"), table.get("scale"), table.get("dropout", 0.0)
    problems = [] if type(rank) is int and rank > 0 else [f"its rank is {rank!r}"]
    problems += [
        f"its {name} is {value!r}" for name, value in (("scale", scale), ("dropout", dropout)) if not is_number(value)
    ]
    alpha = table.get("alpha")
    if alpha is not None and not is_number(alpha):
        problems.append(f"its alpha is {alpha!r}")
    elif alpha not in (None, rank) and "lora_layers" not in found.config:
        # Versions of 2024 multiplied the scale by alpha / rank, until alpha was dropped. Only the first have this name.
        problems.append(
            "it has an alpha, which some versions heed and others do not: remove it from the lora_parameters in"
            f" {CONFIG}, or also multiply the scale there by alpha / rank"
        )
    refuse(found.folder / CONFIG, NAME, problems)
    return rank, float(scale * (1 if alpha is None else alpha / rank)), float(dropout)


def _problem(path: str, tensors: Mapping[str, Tensor], method: str, rank: int) -> str | None:
    """What is wrong with the names or the shapes of the tensors of a layer."""
    needed = {"lora_A", "lora_B"} | ({"lora_magnitude_vector"} if method == "dora" else set())
    if tensors.keys() != needed:
        return f"not the tensors of a {method}, but {', '.join(sorted(tensors))}"
    a, b = tuple(tensors["lora_A"].shape), tuple(tensors["lora_B"].shape)
    if len(a) == len(b) == 3:
        return "adapters of several experts, which are not supported"
    if len(a) != 2 or len(b) != 2 or a[1] != rank or b[0] != rank:
        return f"lora_a {a} and lora_b {b}, which do not fit each other and rank {rank}"
    if method == "dora" and _is_embedding(path):
        return "a DoRA of an embedding, which has a length for each row"
    return None


def _turned(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.replace("lora_", prefix) if name != "lora_magnitude_vector" else name: tensor.mT.contiguous()
        if tensor.ndim == 2
        else tensor
        for name, tensor in tensors.items()
    }


def _is_embedding(path: str) -> bool:
    """Whether models call embeddings so; nothing else in a file tells them from linear layers."""
    name = path.rpartition(".")[2]
    return "embed" in name or name == "wte"


# Writing


def _unfit(where: str, layer: LayerWeights) -> str | None:
    """What there is no place for in a layer."""
    if layer.method not in METHODS:
        return f"{layer.method!r}, which is none of lora and dora"
    numbers = layer.hyperparameters
    if not numbers.keys() <= _NUMBERS or numbers.get("bias"):
        return f"what mlx-lm does not have: {', '.join(sorted(map(str, numbers.keys())))}"
    if not all(is_number(numbers.get(name, 0)) for name in ("alpha", "dropout")) or not isinstance(
        numbers.get("rslora", False), bool
    ):
        return "no usable alpha, dropout or rslora"
    embedding = "lora_embedding_A" in layer.tensors
    prefix = "lora_embedding_" if embedding else "lora_"
    needed = {f"{prefix}A", f"{prefix}B"} | ({"lora_magnitude_vector"} if layer.method == "dora" else set())
    if layer.tensors.keys() != needed:
        return f"not the tensors of a {layer.method}, but {', '.join(sorted(layer.tensors))}"
    a, b = _factors(layer)
    if a.ndim != 2 or b.ndim != 2:
        return "factors that are no matrices: mlx-lm adapts no convolutions"
    if not 0 < a.shape[0] == b.shape[1] == numbers.get("rank"):
        return f"factors {tuple(a.shape)} and {tuple(b.shape)}, which do not fit each other and the rank"
    if layer.method == "dora" and embedding:
        return "a DoRA of an embedding with a length for each feature, where mlx-lm has one for each row"
    if embedding != _is_embedding(where):
        return "a name by which its kind could not be told" if where else "no path"
    return None


def _factors(layer: LayerWeights) -> tuple[Tensor, Tensor]:
    first, second = (tensor for name, tensor in sorted(layer.tensors.items()) if name.endswith(("_A", "_B")))
    return first, second


def _scale(layer: LayerWeights) -> float:
    numbers: Mapping[str, Any] = layer.hyperparameters
    rank = numbers["rank"]
    alpha = numbers.get("alpha")
    return float((rank if alpha is None else alpha) / (math.sqrt(rank) if numbers.get("rslora") else rank))


def _written(layer: LayerWeights, rank: int, scale: float) -> dict[str, Tensor]:
    """The tensors of a layer by the ends of their names, for a rank and a scale that may not be its own."""
    a, b = _factors(layer)
    if _scale(layer) != scale:
        # In single precision: halves would be rounded.
        b = b.to(torch.promote_types(b.dtype, torch.float32)) * (_scale(layer) / scale)
    missing = rank - a.shape[0]
    a, b = (torch.cat([a, a.new_zeros(missing, a.shape[1])]), torch.cat([b, b.new_zeros(b.shape[0], missing)], dim=1))
    magnitude = layer.tensors.get("lora_magnitude_vector")
    return {"lora_a": a.T, "lora_b": b.T} | ({} if magnitude is None else {"m": magnitude})
