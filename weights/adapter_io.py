"""Adapters in files, whatever the format: recognised when read, chosen when written."""

from __future__ import annotations

import contextlib
from contextlib import nullcontext
from dataclasses import replace
from os import PathLike
from pathlib import Path

from weights import formats
from weights.adapter_file import CONFIG, AdapterFile
from weights.disk.atomic import settle
from weights.errors import FileFormatError, WeightsError
from weights.sources import locate
from weights.tensors import pickles
from weights.tensors.open import is_finite

_TRIES = 20
_READ = (".safetensors", ".json", ".bin", ".pt", ".gguf")  # ends of the names of files that are read


def read_adapter(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    pickle: bool = False,
    finite: bool = False,
    max_bytes: int | None = None,
) -> AdapterFile:
    """Read an adapter file; its format is recognised.

    Example:
        >>> factors = {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(3, 1)}
        >>> layer = weights.LayerWeights("lora", {"rank": 1, "alpha": 1.0}, factors)
        >>> path = weights.write_adapter(weights.AdapterFile({"fc": layer}), "style", format="fluxion")
        >>> weights.read_adapter(path)
        AdapterFile(1 layer of lora, 5 parameters, format='fluxion')

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
    patterns = [pattern for known in formats.formats().values() for pattern in known.files]
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
    """A fingerprint of an adapter's files: some of them may be replaced while others are read."""
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
    """Read the adapter at a path on this machine."""
    probe = formats.Probe(path)
    recognised = formats.recognised(probe)
    if len(recognised) > 1:
        raise FileFormatError(
            f"{source} holds adapters in {' and in '.join(recognised)} format; give the file you mean."
        )
    if recognised:
        with contextlib.nullcontext() if probe.tensors is None else probe.tensors.held_open():
            adapter = formats.formats()[recognised[0]].read(probe)
        if not adapter.layers:
            raise FileFormatError(f"{source} has no layers with an adapter in it; fetch or save it again.")
        return replace(adapter, format=recognised[0])
    if probe.file is not None:
        probe.open()  # It may not be sound.
    raise FileFormatError(
        f"{source} holds no adapter in a known format ({', '.join(formats.formats())}); check the path."
    )


def write_adapter(adapter_file: AdapterFile, path: str | PathLike[str], format: str = "peft") -> Path:
    """Write an adapter file: whole or not at all, and the same input gives the same bytes.

    Example:
        >>> layer = weights.LayerWeights("full", {}, {"diff": torch.ones(3, 2)})
        >>> path = weights.write_adapter(weights.AdapterFile({"fc": layer}), "style.safetensors", format="kohya")
        >>> [*weights.open(path)]
        ['lycoris_fc.diff']

    Args:
        adapter_file: The adapter.
        path: The folder; it is made if need be, and a `README.md` already in it is kept. `"lycoris"` takes the name of
            a `.safetensors` file instead, `"diffusers"` and `"fluxion"` either.
        format: `"peft"`, of the PEFT library, `"diffusers"`, `"lycoris"` or `"kohya"`, of LyCORIS and kohya's scripts,
            `"mlx"`, of mlx-lm, or `"fluxion"`, this library's own, which holds every method.

    Returns:
        The path as given.

    Raises:
        FileFormatError: The format is unknown, or cannot hold the adapter.
        FileWriteError: The system refused to write.
    """
    format = formats.canonical(format)
    if adapter_file.counted or adapter_file.interleaved:
        raise FileFormatError(
            "The adapter counts or reorders layers, which only its model resolves: load it there, and save the patch."
        )
    if adapter_file.others:
        names = ", ".join(adapter_file.others)
        raise FileFormatError(
            f"No format that is written has a place for {names}, which is for no layer: leave it out."
        )
    path = Path(path)
    if (write := formats.formats()[format].write) is not None:
        write(adapter_file, path)
    return path


def formats_of(method: str) -> tuple[str, ...]:
    """The formats that can hold adapters of a method, given by its key.

    Example:
        >>> weights.formats_of("vera")
        ('fluxion', 'peft')
    """
    return tuple(name for name, format in formats.formats().items() if format.holds(method))
