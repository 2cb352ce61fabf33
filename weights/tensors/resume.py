"""Resumable writes of large files: a hidden folder with a journal of the bytes that are on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from io import FileIO
from pathlib import Path
from typing import BinaryIO, Self

from torch import Tensor

from weights.disk.atomic import check_written, sync_folder
from weights.disk.locks import locked
from weights.disk.paths import is_folder, place_to_write
from weights.errors import FileFormatError, FileWriteError, WeightsError
from weights.tensors.open import bytes_of


class Workspace:
    """Folder beside a destination with unfinished files, and a journal of the bytes that are on the disk.

    The journal's first line says what is written, so that nothing goes on with what is for something else. Each other
    line is a number of bytes, and is written when these are synced; the last one holds.

    Attributes:
        folder: The folder.
        done: How many bytes there are already, of all files in the order in which they are written.
    """

    def __init__(self, destination: Path, single: bool, fingerprint: str) -> None:
        """No folder is made before the block is entered.

        Args:
            destination: The file or the folder to make.
            single: Whether it is a file. Where that is a symbolic link, what it points to is replaced.
            fingerprint: What is written; equal if the bytes are.
        """
        self._destination = destination
        if single and is_folder(destination):
            raise FileFormatError(f"{destination} is a folder; give the name of a file in it.")
        self._target = place_to_write(destination) if single else place_to_write(destination / "x").parent
        self._single = single
        self._fingerprint = fingerprint
        self.folder = self._target.with_name(f".{self._target.name}.part")
        self._files = self.folder / "files"
        self._lock = ExitStack()
        self.done = 0

    def __enter__(self) -> Workspace:
        try:
            self._check_destination()
            while not self._open():
                self._close()
            self._begin()
        except BlockingIOError:
            self._close()
            raise FileWriteError(
                f"{self._destination} is being written at the moment; wait for that, or stop it."
            ) from None
        except OSError as error:
            self.__exit__(type(error), error, None)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if hasattr(self, "_journal"):
            self._journal.close()
        if error is None:
            shutil.rmtree(self.folder, ignore_errors=True)  # While it is locked: somebody may want to begin.
        self._lock.close()
        if isinstance(error, WeightsError):
            raise error
        if isinstance(error, OSError):
            begun = f"when it can be, the same call goes on with what is in {self.folder}"
            fix = begun if is_folder(self._files) else "choose a place you may write to"
            raise FileWriteError(f"{self._destination} cannot be written: {error.strerror or error}; {fix}.") from error

    def _open(self) -> bool:
        """Open the journal and lock it. Returns whether it is still the one in the folder."""
        path = self.folder / "journal"
        self._files.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # Who had it has ended, and removed it.
            self._journal: BinaryIO = path.open("a+b", buffering=0)
            self._lock.enter_context(locked(path))
            return os.path.samestat(os.fstat(self._journal.fileno()), path.stat())
        return False

    def _close(self) -> None:
        if hasattr(self, "_journal"):
            self._journal.close()
        self._lock.close()

    def _check_destination(self) -> None:
        new = not self._target.exists() or (self._target.is_dir() and not any(self._target.iterdir()))
        if not (self._single or new):
            self._tidy()
            raise FileFormatError(f"{self._destination} is there already; choose another, or remove it first.")

    def _tidy(self) -> None:
        """Remove the folder of a writer that was killed just after the destination appeared."""
        with suppress(OSError), locked(self.folder / "journal"):
            if not (self.folder / "journal").read_bytes():
                shutil.rmtree(self.folder)

    def _begin(self) -> None:
        """Read the journal; discard it where it is for another write, and its last line where that was cut off."""
        self._journal.seek(0)
        lines = self._journal.read().split(b"\n")[:-1]
        self._journal.truncate(0)
        if len(lines) > 1 and lines[0] == self._fingerprint.encode():
            self.done = int(lines[-1])
        else:
            shutil.rmtree(self._files)
            self._files.mkdir()
        self._note(f"{self._fingerprint}\n{self.done}\n")

    def _note(self, text: str) -> None:
        self._journal.write(text.encode())
        os.fsync(self._journal.fileno())

    def writer(self) -> Writer:
        """Writer into the files."""
        return Writer(self._files)

    def sync(self, paths: Sequence[str], done: int) -> None:
        """Sync the files, and note in the journal how many bytes are on the disk."""
        for path in paths:
            with (self._files / path).open("r+b") as file:
                os.fsync(file.fileno())
        for folder in {(self._files / path).parent for path in paths}:
            sync_folder(folder)
        self._note(f"{done}\n")

    def finish(self, tensors: Sequence[str], beside: Mapping[str, bytes | Path]) -> None:
        """Move the written files to the destination, with others given by their content or a file to copy."""
        for path in tensors:
            check_written(self._files / path)
        for path, content in beside.items():
            file = self._files / path
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("wb") as to:
                if isinstance(content, bytes):
                    to.write(content)
                else:
                    with content.open("rb") as source:
                        shutil.copyfileobj(source, to)
                to.flush()
                os.fsync(to.fileno())
        for folder, _, _ in os.walk(self._files):
            sync_folder(Path(folder))
        self._journal.truncate(0)  # For what is there no longer.
        if self._single:
            (self._files / tensors[0]).replace(self._target)
        else:
            if self._target.exists():
                self._target.rmdir()
            self._files.rename(self._target)
        sync_folder(self._target.parent)


class OneFile:
    """One open file of several; it is closed when another one is asked for."""

    def __init__(self) -> None:
        self._path = Path()
        self._file: FileIO | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def at(self, path: Path) -> FileIO:
        """Open file of a path; raises an OSError where it cannot be opened."""
        if self._file is None or path != self._path:
            self.__exit__()
            self._file, self._path = self.open(path), path
        return self._file

    def open(self, path: Path) -> FileIO:
        """Open the file at a path, for reading."""
        return FileIO(path)


class Writer(OneFile):
    """Writer of parts of files, each after the last one or anywhere else."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder

    def open(self, path: Path) -> FileIO:
        """Open the file at a path, for writing, and make it if need be."""
        path.parent.mkdir(parents=True, exist_ok=True)
        # Created by open(2) itself, so that the kernel applies the umask.
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0)
        return FileIO(os.open(path, flags, 0o666), "r+b")

    def write(self, path: str, start: int, content: bytes | Tensor) -> None:
        """Write bytes, or those of a tensor on the CPU, into a file at an offset."""
        file = self.at(self._folder / path)
        file.seek(start)
        rest = memoryview(content) if isinstance(content, bytes) else bytes_of(content)
        while rest:
            rest = rest[file.write(rest) :]  # A raw write may stop at 2 GiB.
