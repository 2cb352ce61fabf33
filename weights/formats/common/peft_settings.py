"""The settings of PEFT's files: checked and read as hyperparameters, and written from them."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.errors import FileFormatError
from weights.formats.common import peft_whole
from weights.formats.common.format import refuse
from weights.formats.common.settings import read_json
from weights.methods.core.patterns import PatternTable, are_quick
from weights.methods.core.peft import PeftLayout, peft_layouts

NAME = "PEFT"

# The settings that are read of every method, with PEFT's defaults.
_COMMON: Mapping[str, Any] = {
    "peft_type": None,
    "base_model_name_or_path": None,
    "task_type": None,
    **peft_whole.DEFAULTS,
}
# Paths with fewer dots may well be the ends of others in the model.
_NAMES = 2
# Settings that do not change what the saved tensors compute: how they were found and trained, and how the base
# model's layers were laid out and selected, which the names of the tensors say better.
_INERT = {
    "auto_mapping",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_weights",
    "layers_pattern",
    "layers_to_transform",
    "peft_version",
    "revision",
    "target_modules",
}


# Reading


def read_config(path: Path) -> dict[str, Any]:
    """The settings in `path`."""
    try:
        fields = read_json(path)
    except FileFormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not readable as JSON: {error}; fetch or save it again.") from error
    if not isinstance(fields, dict):
        raise FileFormatError(f"{path} is not a dict of settings; fetch or save it again.")
    return fields


def checked(settings: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], PeftLayout]:
    """The settings with PEFT's defaults, checked, and the layout of the method."""
    fields = {**_COMMON, **{name: value for name, value in settings.items() if value is not None}}
    candidates = [layout for layout in peft_layouts().values() if layout.type == fields["peft_type"]]
    if not candidates:
        known = ", ".join(sorted({layout.type for layout in peft_layouts().values()}))
        refuse(path, NAME, [f"peft_type is {fields['peft_type']!r}, which is none of {known}"])
    layout = min(candidates, key=lambda layout: len([*_misfits(fields, layout), *(layout.said - fields.keys())]))
    defaults = {**dict(layout.settings.values()), **{name: {} for name in layout.patterns.values()}}
    defaults |= {layout.shared_if: True} if layout.shared_if else {}
    fields = {**defaults, **fields}
    refuse(path, NAME, list(_config_problems(fields, layout)))
    return {**fields, **{name: PatternTable(fields[name]) for name in layout.patterns.values()}}, layout


def _misfits(fields: Mapping[str, Any], layout: PeftLayout) -> Iterator[str]:
    for name, allowed in layout.fixed.items():
        if fields.get(name, allowed[0]) not in allowed:
            yield f"{name}={fields[name]!r} is not supported"


def _config_problems(fields: Mapping[str, Any], layout: PeftLayout) -> Iterator[str]:
    known = {*_COMMON, *_INERT, *layout.inert, *layout.read, *layout.fixed, *layout.patterns.values()}
    known |= {layout.shared_if or "", *(name for name, _ in layout.settings.values())}
    for name in sorted(fields.keys() - known):
        if fields[name]:
            yield f"{name}={fields[name]!r} is not supported"
    yield from _misfits(fields, layout)
    for name in ("base_model_name_or_path", "task_type"):
        if not isinstance(fields[name], str | None):
            yield f"{name} is not a string"
    yield from peft_whole.problems(fields)
    if layout.shared_if and not isinstance(fields[layout.shared_if], bool):
        yield f"{layout.shared_if} is not true or false"
    for name, default in layout.settings.values():
        if not _is_like(fields[name], default):
            yield f"{name}={fields[name]!r} is not {_KINDS.get(type(default), 'of the right kind')}"
    for name, usable in layout.read.items():
        if not usable(fields.get(name)):
            yield f"{name}={fields[name]!r} is not of the right kind"
    for name in layout.patterns.values():
        if not _is_table(fields[name]):
            yield f"{name} is not a dict of regular expressions and numbers"


_KINDS = {int: "a number", float: "a number", bool: "true or false", str: "a string", tuple: "a list of whole numbers"}
_KINDS |= {type(None): "a whole number"}


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a default: a number, a bool, a string, whole numbers; an int if it is None."""
    if default is None:
        return value is None or type(value) is int
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and all(type(item) is int for item in value)
    return _is_number(value) if _is_number(default) else type(value) is type(default)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def _is_table(table: Any) -> bool:
    """Whether a value is a dict of patterns and numbers."""
    try:
        return isinstance(table, dict) and all(map(_is_number, table.values())) and bool(PatternTable(table))
    except ValueError:
        return False


def slow_patterns(fields: Mapping[str, Any], layout: PeftLayout, layers: Collection[str]) -> Iterator[str]:
    """The settings with patterns that would take forever to match."""
    patterns = {name: fields[name].patterns for name in layout.patterns.values()}
    patterns |= {name: [fields[name]] for name in layout.read if isinstance(fields.get(name), str)}
    for name, some in patterns.items():
        if not are_quick(some, layers):
            yield f"{name} has regular expressions that take too long to match: name the layers by whole paths instead"


def hyperparameters(fields: Mapping[str, Any], layout: PeftLayout) -> dict[str, Any]:
    """The hyperparameters that the settings give all layers."""
    return {key: _as_hyperparameter(fields[name], default) for key, (name, default) in layout.settings.items()}


def of_layer(
    fields: Mapping[str, Any], layout: PeftLayout, layer: str, tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """The hyperparameters that they give a layer with these tensors besides, or instead."""
    found: dict[str, Any] = {}
    for hyperparameter, pattern in layout.patterns.items():
        if fields[pattern].patterns:
            name, default = layout.settings[hyperparameter]
            found[hyperparameter] = _as_hyperparameter(fields[pattern].get(layer, fields[name]), default)
    return {**found, **layout.of_layer(fields, layer, tensors)}


def _as_hyperparameter(value: Any, default: Any) -> Any:
    """A setting as methods take it, of the kind of a default."""
    if type(default) is float:
        return float(value)
    if isinstance(value, list):
        return tuple(value)
    return _as_integer(value) if _is_number(value) else value


# Writing


def config_of(
    adapter: AdapterFile, layers: Mapping[str, LayerWeights], layout: PeftLayout, path: Path
) -> dict[str, Any]:
    """The settings that PEFT needs to load an adapter."""
    config: dict[str, Any] = {
        "peft_type": layout.type,
        "task_type": None,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        **({} if layout.whole_model else {"target_modules": _targets(layers, layout)}),
        **{name: allowed[0] for name, allowed in layout.fixed.items()},
    }
    for hyperparameter, (name, default) in layout.settings.items():
        values = _values(layers, path, hyperparameter, default)
        config[name] = _most_common(values) if values else default
        if hyperparameter in layout.patterns:
            config[layout.patterns[hyperparameter]] = _pattern_table(values, config[name], layout.pattern)
        elif len(set(map(repr, values.values()))) > 1:
            refuse(path, NAME, [f"its layers differ in {hyperparameter}, PEFT keeps one"])
    if layout.shared_if:
        config[layout.shared_if] = bool(adapter.shared)
    return {**config, **layout.of_file(adapter)}


def _targets(layers: Mapping[str, LayerWeights], layout: PeftLayout) -> list[str] | str:
    """The `target_modules`: the modules of these layers."""
    if not layers:
        return peft_whole.ALONE
    modules = sorted({peft_whole.module_of(*item) for item in layers.items()} if layout.parameters else layers)
    # PEFT takes names in a list for ends of paths, and a string for a regular expression of whole ones.
    may_be_ends = any(path.count(".") < _NAMES for path in modules)
    return "|".join(map(re.escape, modules)) if may_be_ends else modules


def _values(layers: Mapping[str, LayerWeights], path: Path, name: str, default: Any) -> dict[str, Any]:
    """One hyperparameter of every layer."""
    values = {layer: weights.hyperparameters.get(name, default) for layer, weights in layers.items()}
    unfit = [layer for layer, value in values.items() if not _is_like(value, default)]
    refuse(path, NAME, [f"layer {layer!r} has no usable {name}" for layer in unfit])
    return {layer: _as_integer(value) if _is_number(value) else value for layer, value in values.items()}


def _as_integer(value: float) -> float:
    """`16` for `16.0`, as most files have it."""
    return int(value) if float(value).is_integer() else value


def _most_common(values: Mapping[str, Any]) -> Any:
    counts = Counter(values.values())
    return max(counts, key=lambda value: (counts[value], -value if _is_number(value) else 0))


def _pattern_table(values: Mapping[str, float], default: float, pattern: Callable[[str], str]) -> dict[str, float]:
    """Patterns for the layers that differ from the default, and before them for those that they catch too.

    PEFT takes the first pattern that matches, and also tries them on the tail of a longer path.
    """
    table = {pattern(layer): value for layer, value in values.items() if value != default}
    found = PatternTable(table)
    caught = {pattern(layer): value for layer, value in values.items() if found.get(layer, default) != value}
    return {**caught, **table}
