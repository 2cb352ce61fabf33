"""Files on this machine, opened with care: what is at a path may be a pipe, or a link to what has no end."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from weights.errors import FileFormatError, FileWriteError

_MOST_BYTES = 50_000_000  # of settings and indexes, far beyond those of any model


def check_regular(path: Path) -> None:
    """Raise a FileFormatError for what is there and is no file of bytes: opening a pipe waits for who writes to it."""
    with suppress(OSError):  # Where it cannot be looked at, it cannot be opened.
        if path.exists() and not path.is_file():
            raise FileFormatError(f"{path} is a folder, a pipe or a device, and no file; check the path.")


def is_folder(path: Path) -> bool:
    """Whether there is a folder; not where a path is none, with too long a name or a NUL in it."""
    try:
        return path.is_dir()
    except OSError:
        return False


def place_to_write(path: Path) -> Path:
    """The place a path leads to, through links.

    Raises:
        FileWriteError: It leads nowhere.
        FileFormatError: There is a folder, a pipe or a device.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # too long a name, a link to itself, a NUL
        raise FileWriteError(f"{str(path)!r} cannot be written: {error}; choose another name.") from error
    check_regular(target)
    return target


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


def is_inside(path: str) -> bool:
    """Whether a path, with `/` between its parts, can be joined to a folder and stay in it."""
    return path.isprintable() and not re.search(r"[\\:]", path) and not {"", ".", ".."} & set(path.split("/"))
