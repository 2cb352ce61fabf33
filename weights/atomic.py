"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open

from weights.errors import FileFormatError, FileWriteError
from weights.header import read_header


def write_files(contents: Mapping[Path, Iterable[bytes | memoryview]]) -> None:
    """Write each file's chunks, all files together.

    Every file is written beside its place under a temporary name, synced and (if it is safetensors) opened and
    checked; only when all are there do they take their names. Permissions follow the umask. Where a path is a
    symbolic link, the file it points to is replaced and the link stays. Missing folders are made.

    Raises:
        FileWriteError: The system refused; no temporary file is left, and no old file was touched before all the
            new ones were on the disk.
        FileFormatError: A written safetensors file cannot be read back.
    """
    staged: dict[Path, Path] = {}
    path = Path()
    try:
        for path, chunks in contents.items():
            target = path.resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            staged[target] = temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
            _write(temporary, chunks)
            if target.suffix == ".safetensors":
                check_written(temporary)
        for path, temporary in staged.items():
            temporary.replace(path)
        for folder in {target.parent for target in staged}:
            sync_folder(folder)
    except OSError as error:
        reason = error.strerror or error
        raise FileWriteError(f"{path} cannot be written: {reason}; choose a place you may write to.") from error
    finally:
        for temporary in staged.values():
            temporary.unlink(missing_ok=True)


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    # Created by open(2) itself, so that the kernel applies the umask: reading it is not thread-safe.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def check_written(path: Path) -> None:
    """Open what was written with both readers: the official one, and the stricter one it will be read with here."""
    read_header(path)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise FileFormatError(f"The written file cannot be read back: {error}; nothing was replaced.") from error


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename needs no help
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
