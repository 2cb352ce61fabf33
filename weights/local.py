"""Files on this machine, opened with care: what is at a path may be a pipe, or a link to what has no end."""

from __future__ import annotations

from pathlib import Path

from weights.errors import FileFormatError

_MOST_BYTES = 50_000_000  # of settings and indexes, far beyond those of any model


def check_regular(path: Path) -> None:
    """Raise a FileFormatError for what is there and is no file of bytes: opening a pipe waits for who writes to it."""
    if path.exists() and not path.is_file():
        raise FileFormatError(f"{path} is a folder, a pipe or a device, and no file; check the path.")


def read_small(path: Path) -> bytes:
    """All bytes of a file of settings.

    Raises:
        OSError: It cannot be read.
        FileFormatError: It is no file, or a very large one.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise FileFormatError(f"{path} has more than {_MOST_BYTES:,} bytes; check what it is.")
    return content
