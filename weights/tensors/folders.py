"""Folders of safetensors files, local and on the Hub, by one interface."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from weights.disk.header import Header, Stamp, parse_header, read_header
from weights.disk.paths import read_small
from weights.errors import FileFormatError, HubError, SourceNotFoundError
from weights.hub.download import Snapshot
from weights.hub.path import HubPath

_FIRST_PART = 1 << 16  # bytes; holds most headers whole


class TensorFile(Protocol):
    """Safetensors file whose header alone was read."""

    @property
    def name(self) -> str:
        """Its name in its folder."""

    @property
    def header(self) -> Header:
        """The validated header."""

    def local(self) -> tuple[Path, Stamp]:
        """Local path of the file, downloaded if need be, and the state in which its header was read."""


class Folder(Protocol):
    """Folder of safetensors files."""

    def names(self) -> Iterable[str]:
        """The names of the files in it."""

    def folders(self, linked: bool = True) -> Mapping[str, Folder]:
        """Its sub-folders by name, linked ones too if wanted."""

    def content(self, name: str) -> bytes:
        """The bytes of a small file."""

    def local(self, name: str) -> Path:
        """Local path of a file, downloaded if need be."""

    def file(self, name: str) -> TensorFile:
        """A safetensors file; raises FileFormatError where its header is not sound."""


def local_folder(path: Path) -> tuple[Folder, str]:
    """Local folder of a path, and the name of the file in it; empty where the path is the folder."""
    return (LocalFolder(path), "") if path.is_dir() else (LocalFolder(path.parent), path.name)


def hub_folder(place: HubPath, token: str | None) -> tuple[Folder, str]:
    """Folder of a place on the Hub, and the name of the file in it; empty where the place is the folder."""
    snapshot = Snapshot.of(place, token)
    parent, _, name = place.path.rpartition("/")
    is_file = place.path in snapshot.files
    return (HubFolder(snapshot, parent), name) if is_file else (HubFolder(snapshot, place.path), "")


@dataclass(frozen=True)
class LocalFolder:
    """Local folder."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def names(self) -> Iterable[str]:
        with _reading(self.path):
            return [path.name for path in self.path.iterdir()]

    def folders(self, linked: bool = True) -> Mapping[str, Folder]:
        with _reading(self.path):
            found = [path for path in self.path.iterdir() if path.is_dir() and (linked or not path.is_symlink())]
            return {path.name: LocalFolder(path) for path in found}

    def content(self, name: str) -> bytes:
        with _reading(self.path / name):
            return read_small(self.path / name)

    def local(self, name: str) -> Path:
        return self.path / name

    def file(self, name: str) -> TensorFile:
        path = self.path / name
        return LocalFile(path, *read_header(path))


@dataclass(frozen=True)
class LocalFile:
    """Local safetensors file."""

    path: Path
    header: Header
    stamp: Stamp

    def __str__(self) -> str:
        return str(self.path)

    @property
    def name(self) -> str:
        return self.path.name

    def local(self) -> tuple[Path, Stamp]:
        return self.path, self.stamp


@dataclass(frozen=True)
class HubFolder:
    """Folder of a repository on the Hub."""

    snapshot: Snapshot
    path: str

    def __str__(self) -> str:
        place = self.snapshot.place
        return str(HubPath(place.repo_id, place.revision, self.path))

    def names(self) -> Iterable[str]:
        return [name for name in self.snapshot.inside(self.path) if "/" not in name]

    def folders(self, linked: bool = True) -> Mapping[str, Folder]:
        found = {name.partition("/")[0] for name in self.snapshot.inside(self.path) if "/" in name}
        return {name: HubFolder(self.snapshot, f"{self.path}/{name}".removeprefix("/")) for name in found}

    def content(self, name: str) -> bytes:
        return self.local(name).read_bytes()

    def local(self, name: str) -> Path:
        path = self._inside(name)
        return self.snapshot.fetch([path]) / path

    def file(self, name: str) -> TensorFile:
        path = self._inside(name)
        try:
            return RemoteFile(self.snapshot, path, remote_header(self.snapshot, path))
        except FileFormatError:
            if (self.snapshot.folder / path).is_file():
                self.snapshot.fetch([path])  # Says so, and forgets the file, if it was damaged in the cache.
            raise

    def _inside(self, name: str) -> str:
        found = self.snapshot.inside(self.path).get(name)
        if found is None:
            raise SourceNotFoundError(f"{self} has no file {name}; ask who publishes it.")
        return found


@dataclass(frozen=True)
class RemoteFile:
    """Safetensors file on the Hub."""

    snapshot: Snapshot
    path: str
    header: Header

    def __str__(self) -> str:
        place = self.snapshot.place
        return str(HubPath(place.repo_id, place.revision, self.path))

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def local(self) -> tuple[Path, Stamp]:
        return self._fetched

    @cached_property
    def _fetched(self) -> tuple[Path, Stamp]:
        path = self.snapshot.fetch([self.path]) / self.path
        header, stamp = read_header(path)
        if header != self.header:
            raise HubError(f"{self}: the Hub sent another header than that of the file; open it again.")
        return path, stamp


def remote_header(snapshot: Snapshot, path: str) -> Header:
    """Header of a safetensors file on the Hub: one request for its first 64 KiB, and one more if it is longer."""
    size = snapshot.files[path].size
    first = snapshot.read(path, 0, min(size, _FIRST_PART))

    def read(start: int, stop: int) -> bytes:
        return first[start:stop] if stop <= len(first) else first[start:] + snapshot.read(path, len(first), stop)

    return parse_header(f"{path} of {snapshot.place.repo_id}", size, read)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SourceNotFoundError(f"{path} cannot be read: {error.strerror}; check the path.") from error
