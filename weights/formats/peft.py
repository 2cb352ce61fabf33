"""The format of the PEFT library: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Tensors are named `base_model.model.<path>.<end>`; every number is in the JSON file. The names of each method's tensors
and settings are in `weights.methods`.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from weights.adapter_file import CONFIG, AdapterFile
from weights.errors import SourceNotFoundError
from weights.formats.common import peft_whole
from weights.formats.common.format import Format, Match, refuse
from weights.formats.common.peft_settings import NAME, read_config
from weights.formats.common.peft_tensors import is_key, parse, render
from weights.formats.common.probe import Probe
from weights.formats.common.writing import Chunks, write_folder
from weights.methods.core.peft import peft_layouts
from weights.tensors.open import encode, open_tensors

TENSORS = "adapter_model.safetensors"
FILES = (CONFIG, TENSORS)
METHODS = frozenset({*peft_whole.METHODS, *peft_layouts()})


def recognise(probe: Probe) -> Match:
    """SURE of PEFT's two files, or one of them; FALLBACK where the settings, or all names of tensors, are others."""
    meant = probe.path.is_dir() or probe.path.name in FILES
    if not meant or not any((probe.folder / name).is_file() for name in FILES):
        return Match.NO
    if probe.config and "peft_type" not in probe.config:
        return Match.FALLBACK if (probe.folder / TENSORS).is_file() else Match.NO
    return Match.SURE if probe.tensors is None or any(map(is_key, probe.tensors)) else Match.FALLBACK


def read(probe: Probe) -> AdapterFile:
    """Read a folder written by PEFT, or by `write`.

    Raises:
        SourceNotFoundError: There is no `adapter_model.safetensors`.
        FileFormatError: The files are not sound, contradict each other, or use what is not supported; the message
            lists the problems.
    """
    settings = read_config(probe.folder / CONFIG)
    file = probe.folder / TENSORS
    if not file.exists():
        raise SourceNotFoundError(
            f"{probe.folder} has no {TENSORS}; if the adapter is in a pickle (.bin), read it by"
            " weights.read_adapter(..., pickle=True)."
        )
    tensors = probe.open() if file == probe.file else open_tensors(file)
    return replace(parse(tensors, settings, file), metadata=tensors.metadata)


def write(adapter: AdapterFile, path: Path) -> None:
    """Write a folder that PEFT loads: tensors, config, and a model card unless there is a `README.md` already.

    PEFT keeps no other text in the tensor file, so the adapter's `metadata` is not written.

    Raises:
        FileFormatError: PEFT does not know the method, the layers differ in what the format holds once, they are of
            several components, or the path is that of a file.
        FileWriteError: The system refused to write.
    """
    if path.suffix == ".safetensors":
        refuse(path, NAME, ["its name is that of a file, and PEFT's adapters are folders"])
    parts = {adapter.component_of(where)[0] for where in adapter.layers}
    if len(parts) > 1:
        refuse(
            path, NAME, [f"it is for several models ({', '.join(sorted(parts))}): write the part for each by itself"]
        )
    tensors, settings = render(adapter.part(*parts) if parts else adapter, path)
    config = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    files: dict[str, Chunks] = {TENSORS: encode(tensors, {"format": "pt"}), CONFIG: [config.encode()]}
    write_folder(path, files, adapter, "peft")


FORMAT = Format(recognise, read, write, METHODS, files=FILES)
