"""Adapters in files, whatever the format: recognised when read, chosen when written."""

from __future__ import annotations

import contextlib
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path

from weights.adapter_file import CONFIG, AdapterFile
from weights.disk.atomic import settle
from weights.errors import FileFormatError, WeightsError
from weights.formats import FORMATS, WRITTEN
from weights.formats.found import Found
from weights.sources import locate
from weights.tensors import pickles
from weights.tensors.open import is_finite

_TRIES = 20
_READ = (".safetensors", ".json", ".bin", ".pt", ".gguf")  # endings of what is read


def read_adapter(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    pickle: bool = False,
    finite: bool = False,
    max_bytes: int | None = None,
) -> AdapterFile:
    """Read an adapter; its format is recognised.

    Args:
        source: A folder, a file, or a place on the Hub (`"user/repo"`, `"user/repo@revision"`,
            `"user/repo:folder/file"`).
        revision: Branch, tag or commit, for a place on the Hub.
        token: The Hub token; by default the one `hf auth login` has stored.
        pickle: Whether a file as `torch.save` writes it may be read too, where there is no other.
        finite: Whether NaN or infinity in a tensor is an error.
        max_bytes: How large the file, or all files in the folder, may be; by default any size.

    Raises:
        SourceNotFoundError: There is no such file or folder.
        FileFormatError: No known format, or the file is not sound, or says something that is not supported: nothing
            in it is dropped silently.
        HubError: The Hub failed.
    """
    patterns = [pattern for known in FORMATS.values() for pattern in known.FILES]
    patterns += pickles.FILES if pickle else []
    path = locate(source, revision=revision, token=token, patterns=patterns, max_bytes=max_bytes)
    for _ in range(_TRIES):
        state = _state(path)
        try:
            with pickles.unpickled(path) if pickle else nullcontext(path) as readable:
                adapter = _read(source, readable)
        except WeightsError:
            if _state(path) == state:
                raise
            continue
        if _state(path) == state:
            if finite:
                _check_finite(source, adapter)
            return adapter
        settle(path if path.is_dir() else path.parent)
    raise FileFormatError(f"{source} was changed each time it was read; read it when nobody writes there.")


def _state(path: Path) -> dict[str, tuple[int, int, int]]:
    """What tells one state of an adapter's files from another: some of them may be replaced while others are read."""
    found: dict[str, tuple[int, int, int]] = {}
    with contextlib.suppress(OSError):
        for file in path.iterdir() if path.is_dir() else (path, path.with_name(CONFIG)):
            if file.suffix in _READ and file.exists():
                status = file.stat()
                found[file.name] = status.st_ino, status.st_size, status.st_mtime_ns
    return found


def _check_finite(source: str | PathLike[str], adapter: AdapterFile) -> None:
    """Raise a FileFormatError for the first tensor with NaN or infinity in it."""
    named = {
        f"{name} of {path}": tensor for path, layer in adapter.layers.items() for name, tensor in layer.tensors.items()
    }
    for name, tensor in {**named, **adapter.shared, **adapter.others}.items():
        if not is_finite(tensor):
            raise FileFormatError(f"{source} has NaN or infinity in {name}; train or save it again.")


def _read(source: str | PathLike[str], path: Path) -> AdapterFile:
    """Read what is at a path on this machine."""
    found = Found(path)
    recognised = [name for name, known in FORMATS.items() if known.recognise(found)]
    if len(recognised) > 1:
        raise FileFormatError(
            f"{source} holds adapters in {' and in '.join(recognised)} format; give the file you mean."
        )
    if recognised:
        with contextlib.nullcontext() if found.tensors is None else found.tensors.held_open():
            adapter = FORMATS[recognised[0]].read(found)
        if not adapter.layers:
            raise FileFormatError(f"{source} has no layers with an adapter in it; fetch or save it again.")
        return replace(adapter, format=recognised[0])
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
