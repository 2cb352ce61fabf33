"""The kind of a format: how a file is recognised, read and written."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from weights.adapter_file import AdapterFile
from weights.errors import FileFormatError, listed
from weights.formats.common.probe import Probe


class Match(IntEnum):
    """How sure a format is of a file; it may still prove unsound.

    Attributes:
        NO: It is of another format, or of none.
        FALLBACK: The format can read it, unless another one is surer.
        SURE: It has a mark of the format.
    """

    NO = 0
    FALLBACK = 1
    SURE = 2

    @classmethod
    def sure_if(cls, marked: bool) -> Match:
        """SURE or NO."""
        return cls.SURE if marked else cls.NO


@dataclass(frozen=True)
class Format:
    """A format of adapter files, the `FORMAT` of its module.

    Attributes:
        recognise: Returns how sure the format is of a file. It never raises.
        read: Reads a file that was recognised. Raises a FileFormatError where it is not sound or not supported.
        write: Writes an adapter, None for a format that is only read. Raises a FileFormatError where the format cannot
            hold it.
        methods: The keys of the methods that it can be written with, None for all.
        files: Globs of the files that it reads, for a download; none where they may have any name.
        suffix: The end of the names of its tensor files.
        aliases: Other names of the format.
    """

    recognise: Callable[[Probe], Match]
    read: Callable[[Probe], AdapterFile]
    write: Callable[[AdapterFile, Path], None] | None = None
    methods: Collection[str] | None = ()
    files: Sequence[str] = ()
    suffix: str = ".safetensors"
    aliases: Sequence[str] = ()

    def holds(self, method: str) -> bool:
        """Whether it can be written with layers of a method, given by its key."""
        return self.write is not None and (self.methods is None or method in self.methods)


def refuse(path: Path, format: str, problems: Iterable[str]) -> None:
    """Raise one FileFormatError for all problems, if there are any."""
    if found := list(problems):
        raise FileFormatError(f"{path} does not work as a {format} file: {listed(found)}.")
