"""The formats of adapter files: one module each, of which one recognises a file."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from weights.adapter_file import AdapterFile
from weights.formats import bfl, cloneofsimo, comfyui, diffusers, gguf, lycoris, mlx, native, peft, torchtune, xlabs
from weights.formats.found import Found


class Reader(Protocol):
    """What a module of this package offers."""

    @property
    def FILES(self) -> Sequence[str]:  # noqa: N802 - a constant of the module
        """Globs of the files it reads, for a download; none where they may have any name."""

    def recognise(self, found: Found) -> bool:
        """Whether what is found looks like this format, and like no other; it may still prove unsound."""

    def read(self, found: Found) -> AdapterFile:
        """Read what was recognised; raises FileFormatError where it is not sound or not supported."""


class Writer(Reader, Protocol):
    """What it offers for a format that is written too."""

    @property
    def METHODS(self) -> Collection[str]:  # noqa: N802 - a constant of the module
        """The keys of the methods that it can hold; none where it can hold all."""

    def write(self, adapter: AdapterFile, path: Path) -> None:
        """Write `adapter` at `path`; raises FileFormatError where the format cannot hold it."""


WRITTEN: Mapping[str, Writer] = {
    "fluxion": native,
    "peft": peft,
    "diffusers": diffusers,
    "lycoris": lycoris,
    "mlx": mlx,
}
FORMATS: Mapping[str, Reader] = {
    **WRITTEN,
    "comfyui": comfyui,
    "xlabs": xlabs,
    "bfl": bfl,
    "torchtune": torchtune,
    "cloneofsimo": cloneofsimo,
    "gguf": gguf,
}
