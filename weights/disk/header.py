"""Safetensors headers: eight bytes of length, then JSON with the dtype, shape and offsets of every tensor.

The format is https://github.com/huggingface/safetensors#format. The official reader accepts more than it
promises (duplicate keys, unknown fields, names such as `../../etc/passwd`), so a header is checked here in full
before anything is read through it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from weights.disk.paths import check_regular
from weights.errors import FileFormatError, SourceNotFoundError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
METADATA_KEY = "__metadata__"
MAX_HEADER_BYTES = 25_000_000  # the Hub's own limit; a header of this size takes a second to parse
_FIELDS = {"dtype", "shape", "data_offsets"}
_INT = {int}  # And not its subclass bool.
_MAX_DIMENSIONS = 64  # what torch can index
_MAX_DIMENSION = 2**40

_PICKLES = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_SIGNATURES: Mapping[bytes | tuple[bytes, ...], str] = {
    b"version https://git-lfs": "a Git LFS pointer; fetch the file itself with `git lfs pull` or download it",
    b"PK\x03\x04": "a zip archive, as torch.save writes; convert it to safetensors",
    _PICKLES: "a pickle; convert it to safetensors",
    b"GGUF": "a GGUF file; convert it to safetensors",
    b"<": "an HTML page; download the file itself, not the page about it",
}


@dataclass(frozen=True)
class Stamp:
    """State of a file, by which changes are noticed: inode, size in bytes, time of modification in nanoseconds."""

    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, file: BinaryIO | FileIO) -> Stamp:
        """The stamp of an open file."""
        status = os.fstat(file.fileno())
        return cls(status.st_ino, status.st_size, status.st_mtime_ns)


class TensorInfo(NamedTuple):
    """Dtype, shape and place of a tensor: bytes `start` to `stop`, counted from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """Validated header, and the size of the whole file in bytes."""

    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    size: int


def read_header(path: Path) -> tuple[Header, Stamp]:
    """Read and check the header of the safetensors file at `path`.

    Raises:
        SourceNotFoundError: The file does not exist or cannot be opened.
        FileFormatError: It is not a sound safetensors file; the message says what it looks like, or what is wrong.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            stamp = Stamp.of(file)

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            return parse_header(str(path), stamp.size, read), stamp
    except OSError as error:
        raise SourceNotFoundError(f"{path} cannot be read: {error.strerror}; check the path.") from error


def parse_header(name: str, size: int, read: Callable[[int, int], bytes]) -> Header:
    """Parse and validate a header, wherever the file is.

    Args:
        name: The file, for messages.
        size: Its size in bytes.
        read: Gives the bytes from one offset to another; called for the first 64, then for the header alone.

    Raises:
        FileFormatError: It is not a sound safetensors file; the message says what it looks like, or what is wrong.
    """
    text = _header_text(name, size, read)
    try:
        fields = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
        metadata = _checked_metadata(fields.pop(METADATA_KEY, {}))
        first_byte = 8 + len(text)
        infos = {name: _checked_info(name, value, first_byte) for name, value in fields.items()}
        _check_tiling(infos, first_byte, size)
    except (ValueError, RecursionError) as error:  # bad UTF-8 and bad JSON are ValueErrors too
        raise FileFormatError(f"{name} is not a sound safetensors file: {error}; fetch or save it again.") from error
    return Header(infos, metadata, size)


def check_name(name: str) -> None:
    """Raise a ValueError unless `name` is safe as a tensor's name."""
    climbs = ".." in name and ".." in name.split("/")
    if not name or name == METADATA_KEY or not name.isprintable() or climbs:
        raise ValueError(f"{name!r} is not allowed as a tensor's name")


def _header_text(name: str, size: int, read: Callable[[int, int], bytes]) -> bytes:
    """The JSON of the header; raises a FileFormatError that says what the file looks like instead."""
    start = read(0, min(size, 64))
    length = int.from_bytes(start[:8], "little")
    if size < 10 or length > min(size - 8, MAX_HEADER_BYTES) or start[8:9] != b"{":
        looks = (text for signature, text in _SIGNATURES.items() if start.lstrip().startswith(signature))
        found = next(looks, "something else, cut short, or has too large a header; check where it came from")
        raise FileFormatError(f"{name} is not a safetensors file: it is {found if size else 'empty; fetch it again'}.")
    return read(8, 8 + length)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("a key occurs twice in its header")
    return fields


def _checked_metadata(metadata: Any) -> dict[str, str]:
    if metadata is None:  # As MLX writes it where there is none.
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"its {METADATA_KEY} is not a mapping of strings")
    return metadata


def _checked_info(name: str, fields: Any, first_byte: int) -> TensorInfo:
    check_name(name)
    if not isinstance(fields, dict) or fields.keys() != _FIELDS:
        raise ValueError(f"tensor {name!r} does not have exactly the fields dtype, shape and data_offsets")
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _are_integers(shape) or not _are_integers(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name!r} has a malformed shape or malformed offsets")
    if not isinstance(fields["dtype"], str) or fields["dtype"] not in DTYPES:
        raise ValueError(f"tensor {name!r} has the type {fields['dtype']!r}, which is not supported")
    (start, stop), dtype, sizes = offsets, DTYPES[fields["dtype"]], tuple(shape)
    if (count := _count(sizes)) is None:
        raise ValueError(f"tensor {name!r} has an absurd shape")
    if stop - start != count * dtype.itemsize:
        raise ValueError(f"tensor {name!r} does not have as many bytes as its shape {shape} needs")
    return TensorInfo(dtype, sizes, first_byte + start, first_byte + stop)


@lru_cache(maxsize=1024)  # Files have few different shapes.
def _count(shape: tuple[int, ...]) -> int | None:
    """Number of elements of a shape; None for a shape that no tensor can have."""
    if len(shape) > _MAX_DIMENSIONS or min(shape, default=0) < 0 or max(shape, default=0) >= _MAX_DIMENSION:
        return None
    # Strides multiply the non-zero sizes, so these must not overflow even where the tensor is empty.
    return None if math.prod(size or 1 for size in shape) >= 2**63 else math.prod(shape)


def _are_integers(values: Any) -> bool:
    return isinstance(values, list) and {*map(type, values)} <= _INT


def _check_tiling(infos: Mapping[str, TensorInfo], first_byte: int, size: int) -> None:
    """Raise a ValueError unless every byte after the header belongs to exactly one tensor."""
    end = first_byte
    for info in sorted(infos.values(), key=lambda info: (info.start, info.stop)):
        if info.start != end:
            raise ValueError("its tensors overlap or leave holes")
        end = info.stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, but it has {size} bytes")
