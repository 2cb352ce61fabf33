"""The grammars of adapter files: one module each, tried in the order of `FORMATS` when reading."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from weights.adapter_file import AdapterFile
from weights.formats import lycoris, native, peft


class Format(Protocol):
    """What a module of this package offers."""

    @property
    def METHODS(self) -> Collection[str]:  # noqa: N802 - a constant of the module
        """The keys of the methods that it can hold; none where it can hold all."""

    @property
    def FILES(self) -> Sequence[str]:  # noqa: N802 - a constant of the module
        """Globs of the files it reads, for a download."""

    def recognise(self, path: Path) -> bool:
        """Whether the file or folder at `path` looks like this format; it may still prove unsound."""

    def read(self, path: Path) -> AdapterFile:
        """Read the file or folder at `path`; raises FileFormatError where it is not sound or not supported."""

    def write(self, adapter: AdapterFile, path: Path) -> None:
        """Write `adapter` at `path`; raises FileFormatError where the format cannot hold it."""


FORMATS: Mapping[str, Format] = {"fluxion": native, "peft": peft, "lycoris": lycoris}
