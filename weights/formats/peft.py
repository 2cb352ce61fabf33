"""The format of the PEFT library: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Tensors are named `base_model.model.<path>.<end>`; every number is in the JSON file. What each method calls its tensors
and its numbers is in `peft_methods`, and what they hold besides in `peft_besides`.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.adapter_file import CONFIG, AdapterFile, LayerWeights
from weights.errors import FileFormatError, SourceNotFoundError, listed
from weights.formats import peft_besides as besides
from weights.formats import torchtune
from weights.formats.found import Found, read_json
from weights.formats.output import Chunks, write_folder
from weights.formats.patterns import PatternTable, are_quick
from weights.formats.peft_besides import PREFIX
from weights.formats.peft_methods import GRAMMARS, Grammar
from weights.tensors.open import encode, open_tensors

TENSORS = "adapter_model.safetensors"
FILES = (CONFIG, TENSORS)
METHODS = frozenset({*besides.METHODS, *(grammar.method for grammar in GRAMMARS)})

_ROWS = next(grammar for grammar in GRAMMARS if grammar.method == "trainable_tokens")

# The settings that are read of every method, with PEFT's defaults.
_COMMON: Mapping[str, Any] = {
    "peft_type": None,
    "base_model_name_or_path": None,
    "task_type": None,
    **besides.DEFAULTS,
}
# Paths with fewer dots may well be the ends of others in the model.
_NAMES = 2
# Settings that do not change what the saved tensors compute: how they were found and trained, and how the base
# model's layers were laid out and chosen, which the names of the tensors say better.
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


def recognise(found: Found) -> bool:
    """Whether it is a folder with an `adapter_config.json` of PEFT, or one of the two files in such a folder."""
    meant = found.path.is_dir() or found.path.name in FILES
    there = any((found.folder / name).is_file() for name in FILES)
    return meant and there and ("peft_type" in found.config or not found.config) and not torchtune.recognise(found)


def read(found: Found) -> AdapterFile:
    """Read a folder written by PEFT, or by `write`.

    Raises:
        SourceNotFoundError: There is no `adapter_model.safetensors`.
        FileFormatError: The files are not sound, contradict each other, or use what is not supported; the message
            lists what is wrong.
    """
    settings = _read_config(found.folder / CONFIG)
    file = found.folder / TENSORS
    if not file.exists():
        raise SourceNotFoundError(
            f"{found.folder} has no {TENSORS}; if the adapter is in a pickle (.bin), read it by"
            " weights.read_adapter(..., pickle=True)."
        )
    tensors = found.open() if file == found.file else open_tensors(file)
    return replace(parse(tensors, settings, file), metadata=tensors.metadata)


def parse(tensors: Mapping[str, Tensor], settings: Mapping[str, Any], source: Path) -> AdapterFile:
    """What tensors as in PEFT's files and settings say together.

    Raises:
        FileFormatError: They contradict each other, or use what is not supported; the message names the source.
    """
    fields, grammar = _checked(settings, source)
    named, shared, others = _sorted_out(tensors, grammar)
    beside, stray = besides.layers(tensors, others, fields, grammar.prefix)
    _refuse(source, [f"the key {key!r} is not expected" for key in stray])
    _refuse(source, [] if named or beside else ["it has no adapter in it"])
    _refuse(source, (*_slow_patterns(fields, grammar, named), *_name_problems(named, grammar)))
    common = _hyperparameters(fields, grammar)
    layers = {
        where: LayerWeights(
            grammar.method, {**common, **_of_layer(fields, grammar, where, own)}, dict(sorted(own.items()))
        )
        for where, own in named.items()
    }
    _refuse(source, (*_layer_problems(layers, grammar), *_shared_problems(shared, fields, grammar)))
    base, task = fields["base_model_name_or_path"] or None, fields["task_type"]
    return AdapterFile({**layers, **beside}, base, {}, shared, task)


def write(adapter: AdapterFile, path: Path) -> None:
    """Write a folder that PEFT loads: tensors, config, and a model card unless there is a `README.md` already.

    PEFT keeps no other text in the tensor file, so the adapter's `metadata` is not written.

    Raises:
        FileFormatError: PEFT does not know the method, the layers differ in what the format holds once, they are of
            several components, or the path is that of a file.
        FileWriteError: The system refused to write.
    """
    if path.suffix == ".safetensors":
        _refuse(path, ["its name is that of a file, and PEFT's adapters are folders"])
    parts = {adapter.component_of(where)[0] for where in adapter.layers}
    if len(parts) > 1:
        _refuse(path, [f"it is for several models ({', '.join(sorted(parts))}): write the part for each by itself"])
    tensors, settings = render(adapter.part(*parts) if parts else adapter, path)
    config = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    files: dict[str, Chunks] = {TENSORS: encode(tensors, {"format": "pt"}), CONFIG: [config.encode()]}
    write_folder(path, files, adapter, "peft")


def render(adapter: AdapterFile, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the settings that PEFT needs for an adapter of one model.

    Raises:
        FileFormatError: PEFT cannot hold it; the message names the path, where it was to be written.
    """
    if adapter.flattened:
        _refuse(path, ["the paths of its layers are flattened: load it into the model, and save it from there"])
    layers = {where: layer for where, layer in adapter.layers.items() if layer.method not in besides.METHODS}
    if not layers and {layer.method for layer in adapter.layers.values()} == {"trainable_tokens"}:
        layers = dict(adapter.layers)  # PEFT has a type for this one alone too.
    beside = {where: layer for where, layer in adapter.layers.items() if where not in layers}
    grammar = _grammar_of(layers, beside, path)
    rows = {where: layer for where, layer in beside.items() if layer.method == "trainable_tokens"}
    for some, its in ((layers, grammar), (rows, _ROWS)):
        _refuse(path, _name_problems({where: layer.tensors for where, layer in some.items()}, its))
        _refuse(path, _layer_problems(some, its))
    _refuse(path, [f"layer {where!r} has no tensors" for where, layer in beside.items() if not layer.tensors])
    more, settings, unfit = besides.write(beside, layers, grammar)
    settings = {**_config_of(adapter, layers, grammar, path), **settings}
    _refuse(path, (*_shared_problems(adapter.shared, settings, grammar), *unfit))
    tensors = {
        grammar.key(where, name): grammar.written(name, tensor)
        for where, layer in layers.items()
        for name, tensor in layer.tensors.items()
    }
    tensors |= {grammar.shared[name]: tensor for name, tensor in adapter.shared.items()}
    return tensors | more, settings


# The names of tensors


def _sorted_out(
    tensors: Mapping[str, Tensor], grammar: Grammar
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor], list[str]]:
    """The tensors of adapters by layer, those that all layers have in common, and the other keys."""
    named: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    others: list[str] = []
    for key in tensors:
        where, name = _adapter_key(key, grammar) or (None, "")
        if where is None and name:
            shared[name] = tensors[key]
        elif where is None or name in named.get(where, ()):  # Nothing, or an alias of what is there.
            others.append(key)
        else:
            named.setdefault(where, {})[name] = tensors[key]
    return named, shared, others


def _adapter_key(key: str, grammar: Grammar) -> tuple[str | None, str] | None:
    """The layer and the tensor that a key names; no layer for a shared tensor, which some files have in each layer."""
    for name, whole in grammar.shared.items():
        if key == whole or (key.startswith(PREFIX) and key.endswith(whole.removeprefix("base_model"))):
            return None, name
    if grammar.rooted:
        return ("", grammar.ends[key]) if key in grammar.ends else None
    if key.startswith(PREFIX):
        for end, name in grammar.ends.items():
            if key.endswith(end) and key[-len(end) - 1] == ".":
                where = key[len(PREFIX) : -len(end) - 1]
                return besides.place_of(where, name) if grammar.whole else where, name
    return None


# The settings


def _read_config(path: Path) -> dict[str, Any]:
    """The settings in `path`."""
    try:
        fields = read_json(path)
    except FileFormatError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not readable as JSON: {error}; fetch or save it again.") from error
    if not isinstance(fields, dict):
        raise FileFormatError(f"{path} is not a table of settings; fetch or save it again.")
    return fields


def _checked(settings: Mapping[str, Any], path: Path) -> tuple[dict[str, Any], Grammar]:
    """The settings with PEFT's defaults, checked, and the grammar of the method."""
    fields = {**_COMMON, **{name: value for name, value in settings.items() if value is not None}}
    candidates = [grammar for grammar in GRAMMARS if grammar.type == fields["peft_type"]]
    if not candidates:
        known = ", ".join(dict.fromkeys(grammar.type for grammar in GRAMMARS))
        _refuse(path, [f"peft_type is {fields['peft_type']!r}, which is none of {known}"])
    grammar = min(candidates, key=lambda grammar: len(list(_misfits(fields, grammar))))
    defaults = {**dict(grammar.settings.values()), **{name: {} for name in grammar.patterns.values()}}
    defaults |= {grammar.shared_if: True} if grammar.shared_if else {}
    fields = {**defaults, **fields}
    _refuse(path, _config_problems(fields, grammar))
    return {**fields, **{name: PatternTable(fields[name]) for name in grammar.patterns.values()}}, grammar


def _misfits(fields: Mapping[str, Any], grammar: Grammar) -> Iterator[str]:
    for name, allowed in grammar.fixed.items():
        if fields.get(name, allowed[0]) not in allowed:
            yield f"{name}={fields[name]!r} is not supported"


def _config_problems(fields: Mapping[str, Any], grammar: Grammar) -> Iterator[str]:
    known = {*_COMMON, *_INERT, *grammar.inert, *grammar.read, *grammar.fixed, *grammar.patterns.values()}
    known |= {grammar.shared_if or "", *(name for name, _ in grammar.settings.values())}
    for name in sorted(fields.keys() - known):
        if fields[name]:
            yield f"{name}={fields[name]!r} is not supported"
    yield from _misfits(fields, grammar)
    for name in ("base_model_name_or_path", "task_type"):
        if not isinstance(fields[name], str | None):
            yield f"{name} is not a text"
    yield from besides.problems(fields)
    if grammar.shared_if and not isinstance(fields[grammar.shared_if], bool):
        yield f"{grammar.shared_if} is not true or false"
    for name, default in grammar.settings.values():
        if not _is_like(fields[name], default):
            yield f"{name}={fields[name]!r} is not {_KINDS.get(type(default), 'of the right kind')}"
    for name, usable in grammar.read.items():
        if not usable(fields.get(name)):
            yield f"{name}={fields[name]!r} is not of the right kind"
    for name in grammar.patterns.values():
        if not _is_table(fields[name]):
            yield f"{name} is not a table of regular expressions and numbers"


_KINDS = {int: "a number", float: "a number", bool: "true or false", str: "a text", tuple: "a list of whole numbers"}
_KINDS |= {type(None): "a whole number"}


def _is_like(value: Any, default: Any) -> bool:
    """Whether a value is of the kind of a default: a number, true or false, a text, whole numbers; an int if None."""
    if default is None:
        return value is None or type(value) is int
    if isinstance(default, tuple):
        return isinstance(value, (tuple, list)) and all(type(item) is int for item in value)
    return _is_number(value) if _is_number(default) else type(value) is type(default)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -sys.float_info.max <= value <= sys.float_info.max


def _is_table(table: Any) -> bool:
    """Whether a value is a table of patterns and numbers."""
    try:
        return isinstance(table, dict) and all(map(_is_number, table.values())) and bool(PatternTable(table))
    except ValueError:
        return False


def _slow_patterns(fields: Mapping[str, Any], grammar: Grammar, layers: Collection[str]) -> Iterator[str]:
    """Which settings have patterns that would take forever to match."""
    patterns = {name: fields[name].patterns for name in grammar.patterns.values()}
    patterns |= {name: [fields[name]] for name in grammar.read if isinstance(fields.get(name), str)}
    for name, some in patterns.items():
        if not are_quick(some, layers):
            yield f"{name} has regular expressions that take too long to match: name the layers by whole paths instead"


def _hyperparameters(fields: Mapping[str, Any], grammar: Grammar) -> dict[str, Any]:
    """What the settings say of all layers."""
    return {key: _as_hyperparameter(fields[name], default) for key, (name, default) in grammar.settings.items()}


def _of_layer(fields: Mapping[str, Any], grammar: Grammar, layer: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """What they say of a layer with these tensors besides, or instead."""
    found: dict[str, Any] = {}
    for hyperparameter, pattern in grammar.patterns.items():
        if fields[pattern].patterns:
            name, default = grammar.settings[hyperparameter]
            found[hyperparameter] = _as_hyperparameter(fields[pattern].get(layer, fields[name]), default)
    return {**found, **grammar.of_layer(fields, layer, tensors)}


def _as_hyperparameter(value: Any, default: Any) -> Any:
    """A setting as methods take it, of the kind of a default."""
    if type(default) is float:
        return float(value)
    if isinstance(value, list):
        return tuple(value)
    return _as_integer(value) if _is_number(value) else value


def _grammar_of(layers: Mapping[str, LayerWeights], beside: Mapping[str, LayerWeights], path: Path) -> Grammar:
    """The grammar that can hold these layers, of one method; that of LoRA for what has no adapters."""
    if not layers and beside:
        return GRAMMARS[0]
    if not layers:
        _refuse(path, ["it has no layers with an adapter"])
    methods = sorted({layer.method for layer in layers.values()})
    if len(methods) > 1:
        _refuse(path, [f"it has several methods ({', '.join(methods)}), and PEFT keeps one in a file"])
    known = {grammar.method: grammar for grammar in GRAMMARS}
    if methods[0] not in known:
        _refuse(path, [f"it has the method {methods[0]!r}, which is none of {', '.join(known)}"])
    return known[methods[0]]


def _name_problems(layers: Mapping[str, Mapping[str, Tensor]], grammar: Grammar) -> Iterator[str]:
    """Which layers do not have the tensors that they need."""
    required = grammar.tensors.keys() - grammar.optional
    for path, tensors in layers.items():
        if grammar.rooted and path:
            yield f"layer {path!r} has {grammar.method}, which is for the whole model"
        elif not required <= tensors.keys() <= grammar.tensors.keys() or not tensors:
            have = ", ".join(sorted(tensors)) or "nothing"
            yield f"layer {path!r} has {have} instead of {' and '.join(sorted(required))}"
        elif not grammar.whole and not all(tensor.ndim for tensor in tensors.values()):
            yield f"layer {path!r} has a single number in place of a tensor"


def _layer_problems(layers: Mapping[str, LayerWeights], grammar: Grammar) -> Iterator[str]:
    """What is wrong with tensors that are all there."""
    for path, layer in layers.items():
        if problem := grammar.check(layer):
            yield f"layer {path!r} has {problem}"


def _shared_problems(shared: Iterable[str], settings: Mapping[str, Any], grammar: Grammar) -> Iterator[str]:
    """What is wrong with the names of the tensors that all layers have in common."""
    for name in sorted(set(shared) - grammar.shared.keys()):
        yield f"there is no place for {name!r}, which all layers share"
    if grammar.shared_if is None or settings[grammar.shared_if]:
        for name in sorted(grammar.shared.keys() - set(shared)):
            yield f"the tensor {grammar.shared[name]!r} is missing"


def _config_of(
    adapter: AdapterFile, layers: Mapping[str, LayerWeights], grammar: Grammar, path: Path
) -> dict[str, Any]:
    """The settings PEFT needs to load `adapter`."""
    config: dict[str, Any] = {
        "peft_type": grammar.type,
        "task_type": None,
        "base_model_name_or_path": adapter.base_model,
        "inference_mode": True,
        **({} if grammar.rooted else {"target_modules": _targets(layers, grammar)}),
        **{name: allowed[0] for name, allowed in grammar.fixed.items()},
    }
    for hyperparameter, (name, default) in grammar.settings.items():
        values = _values(layers, path, hyperparameter, default)
        config[name] = _most_common(values) if values else default
        if hyperparameter in grammar.patterns:
            config[grammar.patterns[hyperparameter]] = _pattern_table(values, config[name], grammar.pattern)
        elif len(set(map(repr, values.values()))) > 1:
            _refuse(path, [f"its layers differ in {hyperparameter}, PEFT keeps one"])
    if grammar.shared_if:
        config[grammar.shared_if] = bool(adapter.shared)
    return {**config, **grammar.of_file(adapter)}


def _targets(layers: Mapping[str, LayerWeights], grammar: Grammar) -> list[str] | str:
    """What PEFT is to put adapters on: the modules of these layers."""
    if not layers:
        return besides.ALONE
    modules = sorted({besides.module_of(*item) for item in layers.items()} if grammar.whole else layers)
    # PEFT takes names in a list for ends of paths, and a text for a regular expression of whole ones.
    may_be_ends = any(path.count(".") < _NAMES for path in modules)
    return "|".join(map(re.escape, modules)) if may_be_ends else modules


def _values(layers: Mapping[str, LayerWeights], path: Path, name: str, default: Any) -> dict[str, Any]:
    """One hyperparameter of every layer."""
    values = {layer: weights.hyperparameters.get(name, default) for layer, weights in layers.items()}
    unfit = [layer for layer, value in values.items() if not _is_like(value, default)]
    _refuse(path, [f"layer {layer!r} has no usable {name}" for layer in unfit])
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


def _refuse(path: Path, problems: Iterable[str]) -> None:
    """Raise one FileFormatError for all problems, if there are any."""
    found = list(problems)
    if found:
        raise FileFormatError(f"{path} does not work as a PEFT adapter: {listed(found)}.")
