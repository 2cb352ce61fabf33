"""What there is at a path, for the formats to recognise."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from weights.adapter_file import CONFIG
from weights.disk.paths import read_small
from weights.errors import WeightsError
from weights.formats.keys import stems
from weights.tensors.open import TensorFiles, open_tensors

_LARGEST_NUMBER = 2**100  # so that products of a few are still finite


class Found:
    """A file or a folder. What is in it is read when it is first asked for, and what is not sound is not there.

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
        files = [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))
        return files[0] if len(files) == 1 and files[0].suffix == ".safetensors" else None

    @cached_property
    def tensors(self) -> TensorFiles | None:
        """Those of the file."""
        try:
            return None if self.file is None else open_tensors(self.file)
        except WeightsError:
            return None

    def open(self) -> TensorFiles:
        """The tensors of the file, or the error that says why there are none."""
        return open_tensors(self.file or self.path) if self.tensors is None else self.tensors

    @cached_property
    def stems(self) -> Mapping[str, bool]:
        """What the keys of the file call its layers, and whether one has a tensor that only adapters have."""
        return stems(self.tensors or ())

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """The table in the `adapter_config.json` of the folder."""
        try:
            fields = read_json(self.folder / CONFIG)
        except (OSError, ValueError, RecursionError):
            return {}
        return fields if isinstance(fields, dict) else {}


def read_json(path: Path) -> Any:
    """What is in a file of JSON; raises an OSError, a ValueError or a RecursionError where it cannot be said."""
    return json.loads(read_small(path).decode())


def without(metadata: Mapping[str, str], entry: str) -> dict[str, str]:
    """Metadata without what a format says of itself, which in a file of another format would be wrong."""
    return {name: text for name, text in metadata.items() if name != entry}


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value in settings is a number to calculate with."""
    return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER  # type: ignore[arg-type]
