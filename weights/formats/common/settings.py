"""Settings in JSON, beside tensors or in their metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeGuard

from weights.disk.paths import read_small

_LARGEST_NUMBER = 2**100  # so that products of a few are still finite


def read_json(path: Path) -> Any:
    """The content of a JSON file; raises an OSError, a ValueError or a RecursionError where it has none."""
    return json.loads(read_small(path).decode())


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether a value in settings is a number to calculate with."""
    return type(value) in (int, float) and abs(value) < _LARGEST_NUMBER  # type: ignore[arg-type]


def without(metadata: Mapping[str, str], entry: str) -> dict[str, str]:
    """Metadata without the entry of a format about itself, which in a file of another format would be wrong."""
    return {name: text for name, text in metadata.items() if name != entry}
