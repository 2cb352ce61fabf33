"""Adapters in files, whatever the format: recognised when read, chosen when written."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from weights.adapter_file import AdapterFile
from weights.errors import FileFormatError
from weights.formats import FORMATS, WRITTEN
from weights.formats.found import Found
from weights.sources import locate


def read_adapter(source: str | PathLike[str], *, revision: str | None = None, token: str | None = None) -> AdapterFile:
    """Read an adapter; its format is recognised.

    Args:
        source: A folder, a file in it, or a Hub id (`"user/repo"`, `"user/repo@revision"`).
        revision: Branch, tag or commit, for a Hub id.
        token: The Hub token; by default the one `hf auth login` has stored.

    Raises:
        SourceNotFoundError: There is no such file or folder.
        FileFormatError: No known format, or the file is not sound, or says something that is not supported: nothing
            in it is dropped silently.
        HubError: The Hub failed.
    """
    patterns = [pattern for known in FORMATS.values() for pattern in known.FILES]
    path = locate(source, revision=revision, token=token, patterns=patterns)
    found = Found(path)
    recognised = [name for name, known in FORMATS.items() if known.recognise(found)]
    if len(recognised) > 1:
        raise FileFormatError(
            f"{source} holds adapters in {' and in '.join(recognised)} format; give the file you mean."
        )
    if recognised:
        return FORMATS[recognised[0]].read(found)
    if found.file is not None:
        found.open()  # It may not be sound.
    raise FileFormatError(f"{source} holds no adapter in a known format ({', '.join(FORMATS)}); check the path.")


def write_adapter(adapter_file: AdapterFile, path: str | PathLike[str], format: str = "peft") -> Path:
    """Write an adapter: whole or not at all, and the same input gives the same bytes.

    Args:
        adapter_file: What to write.
        path: The folder; it is made if need be, and a `README.md` already in it is kept. `"lycoris"` takes the name of
            a `.safetensors` file instead, `"diffusers"` and `"fluxion"` either.
        format: `"peft"`, that of the PEFT library, `"diffusers"`, `"lycoris"`, that of LyCORIS and of kohya's scripts,
            `"mlx"`, that of mlx-lm, or `"fluxion"`, this library's own, which holds every method.

    Returns:
        The path as given.

    Raises:
        FileFormatError: The format is unknown, or cannot hold the adapter.
        FileWriteError: The system refused to write.
    """
    if format not in WRITTEN:
        raise FileFormatError(f"{format!r} is no format that is written; choose from {', '.join(WRITTEN)}.")
    if adapter_file.counted or adapter_file.interleaved:
        raise FileFormatError(
            "Only with its model is it known what the adapter says: load it there, and save the patch."
        )
    if adapter_file.others:
        names = ", ".join(adapter_file.others)
        raise FileFormatError(
            f"No format that is written has a place for {names}, which is for no layer: leave it out."
        )
    path = Path(path)
    WRITTEN[format].write(adapter_file, path)
    return path


def formats_of(method: str) -> tuple[str, ...]:
    """The formats that can hold adapters of a method, given by its key."""
    return tuple(name for name, known in WRITTEN.items() if method in known.METHODS or not known.METHODS)
