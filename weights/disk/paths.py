"""Local paths, opened with care: there may be a pipe at a path, or a link to an endless device."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from weights.errors import FileFormatError, FileWriteError

_MOST_BYTES = 50_000_000  # of settings and indexes, far beyond those of any model


def check_regular(path: Path) -> None:
    """Raise a FileFormatError for a folder, a pipe or a device: opening a pipe would block until somebody writes."""
    with suppress(OSError):  # Where it cannot be looked at, it cannot be opened.
        if path.exists() and not path.is_file():
            raise FileFormatError(f"{path} is a folder, a pipe or a device, and no file; check the path.")


def is_folder(path: Path) -> bool:
    """Whether a path is that of a folder; False for names that no path can have, too long or with a NUL."""
    try:
        return path.is_dir()
    except OSError:
        return False


def place_to_write(path: Path) -> Path:
    """The target of a path to be written, links resolved.

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
    """The bytes of a small file, such as settings or an index.

    Raises:
        OSError: It cannot be read.
        FileFormatError: It is not a regular file, or larger than 50 MB.
    """
    check_regular(path)
    with path.open("rb") as file:
        content = file.read(_MOST_BYTES + 1)
    if len(content) > _MOST_BYTES:
        raise FileFormatError(f"{path} has more than {_MOST_BYTES:,} bytes; check what it is.")
    return content


def is_inside(path: str) -> bool:
    """Whether a relative path, with `/` between its parts, stays inside the folder that it is joined to."""
    return path.isprintable() and not re.search(r"[\\:]", path) and not {"", ".", ".."} & set(path.split("/"))
