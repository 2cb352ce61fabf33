"""Files that appear whole or not at all, and several of them together."""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

from weights.disk.header import read_header
from weights.disk.locks import locked
from weights.disk.paths import is_inside, place_to_write, read_small
from weights.errors import FileFormatError, FileWriteError

_STAGE = re.compile(r"\.[0-9a-f]{16}\.tmp")
_JOURNAL = "journal"
_PATIENCE = 30.0  # seconds, in which others have put their files in place


def write_files(contents: Mapping[Path, Iterable[bytes | memoryview]]) -> None:
    """Atomic write of several files: all of them or none.

    Every file is written into a hidden folder, synced and (if it is safetensors) opened and checked; only when all are
    there do they take their names. If the process is killed while they do, the next call that reads or writes there
    puts the rest in place. Permissions follow the umask. Where a path is a symbolic link, the file it points to is
    replaced and the link stays; what is in another folder or on another disk for that is replaced by itself. Missing
    folders are made.

    Raises:
        FileWriteError: The system refused; no temporary file is left, and no old file was touched before all the
            new ones were on the disk.
        FileFormatError: A written safetensors file cannot be read back, or a folder, a pipe or a device has that name.
    """
    stages: dict[Path, _Stage] = {}
    path = Path()
    try:
        targets = {path: place_to_write(path) for path in contents}
        common = Path(os.path.commonpath([path.parent.absolute() for path in contents])).resolve()
        with ExitStack() as stack:
            for path, chunks in contents.items():
                target = targets[path]
                target.parent.mkdir(parents=True, exist_ok=True)
                near = target.is_relative_to(common) and target.parent.stat().st_dev == common.stat().st_dev
                folder = common if near else target.parent
                if folder not in stages:
                    stages[folder] = stack.enter_context(_Stage(folder))
                stages[folder].write(target, chunks)
            for stage in stages.values():
                stage.put_in_place()
    except OSError as error:
        if isinstance(error, FileWriteError):
            raise
        reason = error.strerror or error
        raise FileWriteError(f"{path} cannot be written: {reason}; choose a place you may write to.") from error


class _Stage:
    """Staging folder: hidden, locked while it is written, inside the folder that the files are for.

    Several files are moved under a lock of the folder around it, and by a journal that says where each of them goes:
    what one has begun, another can end.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._targets: dict[str, Path] = {}
        self._lock = ExitStack()

    def __enter__(self) -> _Stage:
        tidy(self._folder)
        while True:
            self._path = self._folder / f".{secrets.token_hex(8)}.tmp"
            self._path.mkdir()
            with suppress(BlockingIOError, FileNotFoundError):  # Who tidies up was quicker, and removes it.
                self._lock.enter_context(locked(self._path))
                if self._path.is_dir():
                    return self
            self._lock.close()

    def __exit__(self, *_: object) -> None:
        if not _is_cut_off(self._path):
            shutil.rmtree(self._path, ignore_errors=True)
        self._lock.close()

    def write(self, target: Path, chunks: Iterable[bytes | memoryview]) -> None:
        """Write a file into the staging folder."""
        name = f"{len(self._targets)}{target.suffix}"
        _write(self._path / name, chunks)
        if target.suffix == ".safetensors":
            check_written(self._path / name)
        self._targets[name] = target

    def put_in_place(self) -> None:
        """Rename the files to their targets."""
        if len(self._targets) == 1:
            for name, target in self._targets.items():
                (self._path / name).replace(target)
                sync_folder(target.parent)
            return
        places = {name: target.relative_to(self._folder).as_posix() for name, target in self._targets.items()}
        with _putting_in_place(self._folder):
            _write(self._path / "new", [json.dumps(places).encode()])
            (self._path / "new").replace(self._path / _JOURNAL)
            sync_folder(self._path)
            sync_folder(self._folder)
            _move(self._path)


def settle(folder: Path) -> None:
    """Finish the renames of a writer that was killed halfway.

    Raises:
        FileWriteError: They cannot be finished, and the folder has old files and new ones.
    """
    if any(map(_is_cut_off, _stages(folder))):
        with _putting_in_place(folder):
            pass


@contextmanager
def _putting_in_place(folder: Path) -> Iterator[None]:
    """Block in which this process alone renames files in a folder, after unfinished renames were finished."""
    try:
        lock = ExitStack()
        sure = lock.enter_context(locked(folder, _PATIENCE))
    except BlockingIOError:
        raise FileWriteError(f"{folder} is being written at the moment; wait for that, or stop it.") from None
    with lock:
        for stage in filter(_is_cut_off, _stages(folder) if sure else ()):
            try:
                _move(stage)
                shutil.rmtree(stage)
            except OSError as error:
                raise FileWriteError(
                    f"Somebody was stopped while they wrote into {folder}, and the rest cannot be put in place:"
                    f" {error.strerror or error}; do this again where you may write there."
                ) from error
        yield


def _move(stage: Path) -> None:
    """Rename the remaining files of a staging folder as its journal says."""
    try:
        places = {str(name): str(place) for name, place in json.loads(read_small(stage / _JOURNAL)).items()}
    except (ValueError, AttributeError, RecursionError) as error:
        raise OSError(f"{stage / _JOURNAL} is not sound") from error
    folder = stage.parent.resolve()
    moves = {stage / name: folder / place for name, place in places.items()}
    # A folder may come from anywhere, with a journal in it.
    inside = all(map(is_inside, (*places, *places.values()))) and not any("/" in name for name in places)
    if not (inside and all(target.parent.resolve().is_relative_to(folder) for target in moves.values())):
        raise OSError(f"{stage / _JOURNAL} leads out of the folder")
    for file, target in moves.items():
        if file.exists():
            file.replace(target)
    for parent in {target.parent for target in moves.values()}:
        sync_folder(parent)
    (stage / _JOURNAL).unlink()


def tidy(folder: Path) -> None:
    """Finish the renames of killed writers, as `settle` does, and remove staging folders that have no journal."""
    settle(folder)
    for stage in _stages(folder):
        with suppress(OSError), locked(stage) as sure:
            if sure and not _is_cut_off(stage):
                shutil.rmtree(stage, ignore_errors=True)


def _stages(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            found = [Path(entry) for entry in entries if _STAGE.fullmatch(entry.name)]
    except OSError:  # There is no such folder, or it cannot be looked into.
        return []
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _is_cut_off(stage: Path) -> bool:
    """Whether some files of a staging folder were renamed and others not."""
    return (stage / _JOURNAL).exists()


def _write(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    # Created by open(2) itself, so that the kernel applies the umask: reading it is not thread-safe.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
    with os.fdopen(descriptor, "wb") as file:
        for chunk in chunks:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def check_written(path: Path) -> None:
    """Validate a written safetensors file by both readers: the official one and the stricter one of this package."""
    read_header(path)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise FileFormatError(f"The written file cannot be read back: {error}; nothing was replaced.") from error


def sync_folder(folder: Path) -> None:
    """Sync a folder, so that renames in it survive a crash."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, and a rename needs no help
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
