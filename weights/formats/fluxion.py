"""This library's own format: one safetensors file that describes itself, for any method.

Tensors are named `<path>/<tensor>`, those that all layers have in common `/<tensor>`. The header's metadata has one
entry, `fluxion_adapter`, a JSON table: the `version`, the `base_model` and a fingerprint of its structure, for each
layer its `method` and its `hyperparameters`, and the `components` if there are any.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.errors import FileFormatError
from weights.formats.common.format import Format, Match
from weights.formats.common.probe import Probe
from weights.formats.common.settings import without
from weights.formats.common.writing import write_file
from weights.tensors.open import encode, open_tensors

TENSORS = "adapter.safetensors"

_ENTRY = "fluxion_adapter"
_VERSION = 1


def recognise(probe: Probe) -> Match:
    """SURE of a file with such an entry, and of a folder with a file of that name."""
    describes_itself = probe.tensors is not None and _ENTRY in probe.tensors.metadata
    return Match.sure_if(describes_itself or (probe.path / TENSORS).is_file())


def read(probe: Probe) -> AdapterFile:
    """Read a file, or the one in a folder.

    Raises:
        FileFormatError: The file is not sound, or of a later version.
    """
    file = probe.path / TENSORS if (probe.path / TENSORS).is_file() else probe.file or probe.path
    tensors = probe.open() if file == probe.file else open_tensors(file)
    try:
        about = json.loads(tensors.metadata[_ENTRY])
        version, base, layers = about["version"], about["base_model"], about["layers"]
        structure = about.get("base_structure")
        components = _names(about.get("components", []))
        described = {where: (str(one["method"]), _numbers(one["hyperparameters"])) for where, one in layers.items()}
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{file} does not say what adapter it is ({error}); fetch or save it again.") from error
    if version != _VERSION or not all(isinstance(text, str | None) for text in (base, structure)):
        raise FileFormatError(f"{file} is of version {version!r}, this library reads {_VERSION}: get a newer one.")
    if not described:
        raise FileFormatError(f"{file} has no layers in it; fetch or save it again.")
    named: dict[str, dict[str, Tensor]] = {where: {} for where in described}
    shared: dict[str, Tensor] = {}
    for key in tensors:
        where, separator, name = key.rpartition("/")
        if separator and (where in named or not where):
            named.get(where, shared)[name] = tensors[key]
        else:
            raise FileFormatError(f"{file} has a tensor {key!r} of no layer that it describes; fetch or save it again.")
    content = {where: LayerWeights(*about, named[where]) for where, about in described.items()}
    metadata = without(tensors.metadata, _ENTRY)
    return AdapterFile(content, base, metadata, shared, components=components, base_structure=structure)


def write(adapter: AdapterFile, path: Path) -> None:
    """Write a file, or a folder with it and a model card, unless there is a `README.md` already.

    Raises:
        FileFormatError: The adapter has no layers, or their paths are flattened, or JSON cannot hold a hyperparameter.
        FileWriteError: The system refused to write.
    """
    if not adapter.layers:
        raise FileFormatError(f"{path} would have no layers in it: there is nothing to save.")
    if adapter.flattened:
        raise FileFormatError(
            f"{path} would have flattened paths of layers: load the adapter into its model, and save it from there."
        )
    tensors = {f"{where}/{name}": t for where, layer in adapter.layers.items() for name, t in layer.tensors.items()}
    tensors |= {f"/{name}": tensor for name, tensor in adapter.shared.items()}
    encoded = encode(tensors, {_ENTRY: _about(adapter)})
    write_file(path, TENSORS, encoded, adapter, "fluxion")


def _numbers(table: Mapping[str, Any]) -> dict[str, Any]:
    """Hyperparameters, with tuples where JSON has lists."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


def _names(names: Any) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError("its components are no list of names")
    return tuple(names)


def _about(adapter: AdapterFile) -> str:
    layers: Mapping[str, Any] = {
        where: {"method": layer.method, "hyperparameters": dict(layer.hyperparameters)}
        for where, layer in adapter.layers.items()
    }
    table: dict[str, Any] = {"version": _VERSION, "base_model": adapter.base_model, "layers": layers}
    table |= {"components": list(adapter.components)} if adapter.components else {}
    table |= {"base_structure": adapter.base_structure} if adapter.base_structure else {}
    try:
        return json.dumps(table, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"A hyperparameter cannot be stored as JSON: {error}.") from error


FORMAT = Format(recognise, read, write, methods=None, files=(TENSORS,))
