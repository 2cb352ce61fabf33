"""A probe of a file or a folder, for the formats to recognise."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from weights.adapter_file import CONFIG
from weights.errors import WeightsError
from weights.formats.common.key_ends import stems
from weights.formats.common.settings import read_json
from weights.tensors.open import TensorFiles, open_tensors


class Probe:
    """A file or a folder, read as far as it is asked for. An unsound part of it counts as absent.

    Attributes:
        path: The path as given.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def folder(self) -> Path:
        """The folder itself, or that of the file."""
        return self.path if self.path.is_dir() else self.path.parent

    @cached_property
    def file(self) -> Path | None:
        """The safetensors file that is meant: the path itself, or the only one in the folder."""
        return self.only(".safetensors")

    def only(self, suffix: str) -> Path | None:
        """The file with a suffix that is meant: the path itself, or the only one in the folder."""
        files = [self.path] if self.path.is_file() else sorted(self.path.glob(f"*{suffix}"))
        return files[0] if len(files) == 1 and files[0].suffix == suffix else None

    @cached_property
    def tensors(self) -> TensorFiles | None:
        """The tensors of the safetensors file."""
        try:
            return None if self.file is None else open_tensors(self.file)
        except WeightsError:
            return None

    def open(self) -> TensorFiles:
        """The tensors of the safetensors file, or the error that says why there are none."""
        return open_tensors(self.file or self.path) if self.tensors is None else self.tensors

    @cached_property
    def stems(self) -> Mapping[str, bool]:
        """The names of layers in the keys of the file, and whether one has a tensor that only adapters have."""
        return stems(self.tensors or ())

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The settings in the `adapter_config.json` of the folder."""
        try:
            fields = read_json(self.folder / CONFIG)
        except (OSError, ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}
