"""The format of the PEFT library: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Tensors are named `base_model.model.<path>.lora_A.weight` and `.lora_B.weight`, and for embeddings
`.lora_embedding_A` and `.lora_embedding_B`; every number is in the JSON file.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from weights.adapter_file import AdapterFile, LayerWeights
from weights.atomic import write_files
from weights.card import model_card
from weights.errors import FileFormatError, SourceNotFoundError
from weights.files import encode, open_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
CARD = "README.md"
FILES = (CONFIG, TENSORS)

_KEY = re.compile(
    r"base_model\.model\.(?P<path>.+)\.(?P<tensor>lora_[AB](?=\.weight$)|lora_embedding_[AB]$)(\.weight)?"
)
_TENSOR_NAMES = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})

# The settings that are read, with PEFT's defaults.
_DEFAULTS: Mapping[str, Any] = {
    "peft_type": None,
    "base_model_name_or_path": None,
    "r": 8,
    "lora_alpha": 8,
    "lora_dropout": 0.0,
    "use_rslora": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "bias": "none",
    "init_lora_weights": True,
}
# Settings that do not change what the saved tensors compute: how they were found and trained, and how the base
# model's layers were laid out and chosen, which the names of the tensors say better.
_INERT = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# The other initialisations (PiSSA, OLoRA, CorDA, ...) change the base model's weights too when PEFT loads the file.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal")


def recognise(path: Path) -> bool:
    """Whether `path` is a folder with an `adapter_config.json`, or one of the two files in such a folder."""
    return (path / CONFIG).is_file() or (path.name in FILES and path.with_name(CONFIG).is_file())


def read(path: Path) -> AdapterFile:
    """Read a folder written by PEFT, or by `write`.

    Raises:
        SourceNotFoundError: There is no `adapter_model.safetensors`.
        FileFormatError: The files are not sound, contradict each other, or use anything but plain LoRA; the message
            lists what is wrong.
    """
    folder = path if path.is_dir() else path.parent
    config = _read_config(folder / CONFIG)
    if not (folder / TENSORS).exists():
        raise SourceNotFoundError(
            f"{folder} has no {TENSORS}; if the adapter is in a pickle (.bin), save it again as safetensors."
        )
    tensors = open_tensors(folder / TENSORS)
    keys: dict[str, dict[str, str]] = {}
    stray = []
    for key in tensors:
        if match := _KEY.fullmatch(key):
            keys.setdefault(match["path"], {})[match["tensor"]] = key
        else:
            stray.append(f"the key {key!r} is not expected")
    _refuse(folder / TENSORS, stray or ([] if keys else ["it has no adapter in it"]))
    layers = {
        layer: LayerWeights(
            method="lora",
            hyperparameters={
                "rank": _as_integer(_lookup(config["rank_pattern"], layer, config["r"])),
                "alpha": float(_lookup(config["alpha_pattern"], layer, config["lora_alpha"])),
                "dropout": float(config["lora_dropout"]),
                "rslora": config["use_rslora"],
            },
            tensors={name: tensors[key] for name, key in sorted(named.items())},
        )
        for layer, named in keys.items()
    }
    _refuse(folder, _layer_problems(layers))
    return AdapterFile(layers, config["base_model_name_or_path"] or None, tensors.metadata)


def write(adapter: AdapterFile, path: Path) -> None:
    """Write a folder that PEFT loads: tensors, config, and a model card unless there is a `README.md` already.

    PEFT keeps no other text in the tensor file, so the adapter's `metadata` is not written.

    Raises:
        FileFormatError: A layer is not plain LoRA, or the layers differ in what the format holds once.
        FileWriteError: The system refused to write.
    """
    _refuse(path, _layer_problems(adapter.layers) if adapter.layers else ["it has no layers"])
    tensors = {
        f"base_model.model.{layer}.{name}{'' if 'embedding' in name else '.weight'}": tensor
        for layer, weights in adapter.layers.items()
        for name, tensor in weights.tensors.items()
    }
    config = json.dumps(_config_of(adapter, path), indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    contents: dict[Path, Iterable[bytes | memoryview]] = {
        path / TENSORS: encode(tensors, {"format": "pt"}),
        path / CONFIG: [config.encode()],
    }
    if not (path / CARD).exists():  # somebody may have written it by hand
        contents[path / CARD] = [model_card(adapter).encode()]
    write_files(contents)


def _read_config(path: Path) -> dict[str, Any]:
    """The settings in `path` with PEFT's defaults, checked."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not readable as JSON: {error}; fetch or save it again.") from error
    if not isinstance(fields, dict):
        raise FileFormatError(f"{path} is not a table of settings; fetch or save it again.")
    config = {**_DEFAULTS, **{name: value for name, value in fields.items() if value is not None}}
    _refuse(path, _config_problems(config))
    return config


def _config_problems(config: Mapping[str, Any]) -> Iterator[str]:
    if config["peft_type"] != "LORA":
        yield f"peft_type is {config['peft_type']!r}, only 'LORA' is supported"
        return
    for name in sorted(config.keys() - _DEFAULTS.keys() - _INERT):
        if config[name]:
            yield f"{name}={config[name]!r} is not supported"
    if config["bias"] != "none":
        yield f"bias={config['bias']!r} is not supported"
    if config["init_lora_weights"] not in _INITIALISATIONS:
        yield f"init_lora_weights={config['init_lora_weights']!r} also changes the base model, convert it with PEFT"
    if not isinstance(config["base_model_name_or_path"], str | None):
        yield "base_model_name_or_path is not a text"
    if not isinstance(config["use_rslora"], bool):
        yield "use_rslora is not true or false"
    for name in ("r", "lora_alpha", "lora_dropout"):
        if not _is_number(config[name]):
            yield f"{name}={config[name]!r} is not a number"
    for name in ("rank_pattern", "alpha_pattern"):
        if not _is_pattern_table(config[name]):
            yield f"{name} is not a table of regular expressions and numbers"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_pattern_table(table: Any) -> bool:
    if not isinstance(table, dict) or not all(_is_number(value) for value in table.values()):
        return False
    try:
        return all(re.compile(pattern) for pattern in table)
    except re.error:
        return False


def _lookup(table: Mapping[str, Any], layer: str, default: Any) -> Any:
    """The layer's value as PEFT finds it: the first pattern that matches the end of the path, from a dot on."""
    for pattern, value in table.items():
        if re.match(rf"(.*\.)?({pattern})$", layer):
            return value
    return table.get(layer, default)


def _layer_problems(layers: Mapping[str, LayerWeights]) -> Iterator[str]:
    for path, layer in layers.items():
        if layer.method != "lora":
            yield f"layer {path!r} has the method {layer.method!r}, only 'lora' is supported"
        elif layer.tensors.keys() not in _TENSOR_NAMES:
            yield f"layer {path!r} has {', '.join(sorted(layer.tensors)) or 'nothing'} instead of lora_A and lora_B"
        else:
            a, b = (tuple(layer.tensors[name].shape) for name in sorted(layer.tensors))
            rank = layer.hyperparameters.get("rank")
            fit = len(a) == len(b) >= 2 and set(b[2:]) <= {1}
            if not fit or not rank or a[0] != rank or b[1] != rank:
                yield f"layer {path!r} has lora_A {a} and lora_B {b}, which do not fit each other and rank {rank}"


def _config_of(adapter: AdapterFile, path: Path) -> dict[str, Any]:
    """The settings PEFT needs to load `adapter`."""
    ranks = _values(adapter, path, "rank")
    alphas = {layer: _as_integer(value) for layer, value in _values(adapter, path, "alpha").items()}
    once = {name: set(_values(adapter, path, name).values()) for name in ("dropout", "rslora")}
    _refuse(path, [f"its layers differ in {name}, PEFT keeps one" for name in once if len(once[name]) > 1])
    rank, alpha = _most_common(ranks), _most_common(alphas)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        "target_modules": sorted(adapter.layers),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": once["dropout"].pop(),
        "use_rslora": once["rslora"].pop(),
        "rank_pattern": _pattern_table(ranks, rank),
        "alpha_pattern": _pattern_table(alphas, alpha),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
    }


def _values(adapter: AdapterFile, path: Path, name: str) -> dict[str, Any]:
    """One hyperparameter of every layer."""
    values = {layer: weights.hyperparameters.get(name) for layer, weights in adapter.layers.items()}
    unfit = [layer for layer, value in values.items() if not isinstance(value, bool) and not _is_number(value)]
    _refuse(path, [f"layer {layer!r} has no usable {name}" for layer in unfit])
    return values


def _as_integer(value: float) -> float:
    """`16` for `16.0`, as most files have it."""
    return int(value) if float(value).is_integer() else value


def _most_common(values: Mapping[str, float]) -> float:
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], -value))


def _pattern_table(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Patterns for the layers that differ from the default.

    PEFT also tries a pattern on the tail of a longer path; `^` keeps it to the whole path.
    """
    return {f"^{re.escape(layer)}": value for layer, value in values.items() if value != default}


def _refuse(path: Path, problems: Iterable[str]) -> None:
    """Raise one FileFormatError for all problems, if there are any."""
    found = list(problems)
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise FileFormatError(f"{path} does not work as a PEFT LoRA: {'; '.join(found[:5])}{more}.")
