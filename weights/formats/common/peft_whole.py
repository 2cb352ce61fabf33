"""Parameters, and rows of embeddings, that PEFT's files hold whole beside the adapters of a method.

`modules_to_save` and `bias` ask for parameters, which are layers of the method `"copy"` here;
`trainable_token_indices` asks for rows of embeddings, which are layers of the method `"trainable_tokens"`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from torch import Tensor

from weights.adapter_file import LayerWeights
from weights.methods.core.peft import PeftLayout

METHODS = ("copy", "trainable_tokens")
DEFAULTS: Mapping[str, Any] = {"bias": "none", "modules_to_save": None, "trainable_token_indices": None}
"""The settings that ask for them, and PEFT's defaults."""
ALONE = "dummy-target-modules"
"""PEFT's name for the targets of a file that holds nothing else."""

_BIASES = ("bias", "in_proj_bias")
_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
_ROWS = "trainable_tokens_delta"
_ROWS_END = f".token_adapter.{_ROWS}"
# With bias="all", PEFT also writes the biases of modules that it has wrapped to save them: original and copy again.
_WRAPPED = (".original_module.", ".modules_to_save.")


def place_of(module: str, name: str) -> str:
    """The path of the layer that a parameter of a module is, or belongs to if it is a buffer."""
    return module if name == "weight" or name in _BUFFERS else f"{module}.{name}"


def module_of(path: str, layer: LayerWeights) -> str:
    """The path of the module that a layer is, or is a parameter of."""
    names = list(layer.tensors)
    return path.removesuffix(f".{names[0]}") if len(names) == 1 and names[0] != "weight" else path


def problems(fields: Mapping[str, Any]) -> Iterator[str]:
    """The problems of the settings."""
    if not isinstance(fields["bias"], str):
        yield "bias is not a string"
    modules = fields["modules_to_save"]
    if modules is not None and not (isinstance(modules, list) and all(isinstance(name, str) for name in modules)):
        yield "modules_to_save is not a list of names"
    tokens = fields["trainable_token_indices"]
    for some in tokens.values() if isinstance(tokens, dict) else [] if tokens is None else [tokens]:
        if not (isinstance(some, list) and all(type(token) is int for token in some)):
            yield "trainable_token_indices is not a list of numbers, nor a dict of such lists"


def layers(
    tensors: Mapping[str, Tensor], keys: Collection[str], fields: Mapping[str, Any], prefix: str
) -> tuple[dict[str, LayerWeights], list[str]]:
    """The layers that some keys of a file stand for, and the keys that stand for none."""
    named: dict[str, dict[str, Tensor]] = {}
    stray = []
    for key in keys:
        module, _, name = key.removeprefix(prefix).rpartition(".")
        if not key.startswith(prefix):
            stray.append(key)
        elif key.endswith(_ROWS_END) and fields["trainable_token_indices"] is not None:
            named[module.removesuffix(".token_adapter")] = {name: tensors[key]}
        elif fields["bias"] == "all" and any(
            key.replace(wrapped, ".") in tensors for wrapped in _WRAPPED if wrapped in key
        ):
            continue
        elif fields["bias"] != "none" and name in _BIASES:
            named.setdefault(place_of(module.removesuffix(".base_layer"), name), {})[name] = tensors[key]
        elif _is_saved(module, fields["modules_to_save"] or ()):
            named.setdefault(place_of(module, name), {})[name] = tensors[key]
        else:
            stray.append(key)
    return {path: _layer(path, own, fields) for path, own in named.items()}, stray


def _is_saved(module: str, modules_to_save: Collection[str]) -> bool:
    """Whether PEFT takes a module, or one around it, for one of these: its path ends in one of the names."""
    names = module.split(".")
    around = [".".join(names[:end]) for end in range(1, len(names) + 1)]
    return any(path.endswith(name) for path in around for name in modules_to_save)


def _layer(path: str, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> LayerWeights:
    if _ROWS not in tensors:
        return LayerWeights("copy", {}, tensors)
    tokens = fields["trainable_token_indices"]
    if isinstance(tokens, dict):
        tokens = next((value for name, value in tokens.items() if path.endswith(name)), [])
    return LayerWeights("trainable_tokens", {"tokens": tuple(tokens)}, tensors)


def write(
    besides: Mapping[str, LayerWeights], adapted: Collection[str], layout: PeftLayout
) -> tuple[dict[str, Tensor], dict[str, Any], list[str]]:
    """The tensors and the settings of layers beside adapters, and the reasons why PEFT cannot hold them.

    Args:
        besides: The layers.
        adapted: The paths of the layers that have adapters.
        layout: The layout of their method.
    """
    tokens = {path: layer for path, layer in besides.items() if layer.method == "trainable_tokens"}
    copies = {path: layer for path, layer in besides.items() if layer.method == "copy"}
    modules = {path: module_of(path, layer) for path, layer in copies.items()}
    saved = {modules[path] for path, layer in copies.items() if not set(layer.tensors) <= set(_BIASES)}
    outer = sorted(module for module in saved if not _parents(module) & saved)
    biases = {module for module in modules.values() if not ({module} | _parents(module)) & saved}
    tensors = {f"{layout.prefix}{path}{_ROWS_END}": layer.tensors[_ROWS] for path, layer in tokens.items()}
    for path, layer in copies.items():
        module = modules[path]
        wrapped = ".base_layer" if module in adapted and module in biases else ""
        tensors |= {f"{layout.prefix}{module}{wrapped}.{name}": tensor for name, tensor in layer.tensors.items()}
    settings: dict[str, Any] = {"modules_to_save": outer or None}
    if biases:
        settings["bias"] = f"{layout.type.lower()}_only" if biases <= set(adapted) else "all"
    if tokens:
        settings["trainable_token_indices"] = {path: layer.hyperparameters["tokens"] for path, layer in tokens.items()}
    unfit = [
        f"{layout.type} has no {what} beside it in PEFT's files"
        for what, some, held in (("biases", biases, layout.biases), ("tokens", tokens, layout.tokens))
        if some and not held
    ]
    unfit += [f"layer {path!r} has an adapter and is saved whole too" for path in sorted(saved & set(adapted))]
    return tensors, settings, unfit


def _parents(path: str) -> set[str]:
    return {path[:end] for end in range(len(path)) if path[end] == "."}
