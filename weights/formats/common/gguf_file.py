"""GGUF files: their fields and tensors.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The reader of the `gguf` package never
returns where an array claims to be longer than the file, so everything is read here, against the size of the file; only
quantized numbers are left to the package.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from weights.disk.header import MAX_HEADER_BYTES, check_name
from weights.errors import FileFormatError, SourceNotFoundError

MAGIC = b"GGUF"
EXTRA = "pip install fluxion-adapters[gguf]"

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_ALIGNMENT = 32
_PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}


@dataclass(frozen=True)
class TensorInfo:
    """One tensor's type, by GGUF's number, its shape with the fastest dimension last, and where its bytes start."""

    type: int
    shape: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class GgufFile:
    """A file of which the first part has been read. Arrays are left out of the fields but for their names."""

    path: Path
    fields: Mapping[str, Any]
    infos: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, path: Path) -> GgufFile:
        """Read all but the tensors.

        Raises:
            SourceNotFoundError: The file cannot be read.
            FileFormatError: It is not a sound GGUF file.
        """
        try:
            with path.open("rb") as file:
                start = _Start(file.read(MAX_HEADER_BYTES))
        except OSError as error:
            raise SourceNotFoundError(f"{path} cannot be read: {error.strerror}; check the path.") from error
        try:
            return cls(path, *start.parse())
        except (ValueError, struct.error) as error:  # Bad UTF-8 is a ValueError too.
            raise FileFormatError(f"{path} is not a sound GGUF file: {error}; fetch or save it again.") from error

    def read(self) -> dict[str, Tensor]:
        """All tensors; what is quantized in single precision.

        Raises:
            FileFormatError: The file does not hold what it says, or has a type of numbers that is not supported.
        """
        sizes = {name: self._size(name, info) for name, info in self.infos.items()}
        try:
            with self.path.open("rb") as file:
                whole = file.seek(0, os.SEEK_END)
                for name, info in self.infos.items():
                    if info.start + sizes[name] > whole:
                        raise FileFormatError(f"{self.path} is cut short at tensor {name!r}; fetch it again.")
                # Tensors that share bytes could make far more of them than there are.
                if sum(sizes.values()) > whole:
                    raise FileFormatError(f"{self.path} has tensors that overlap; fetch it again.")
                return {name: self._tensor(file, name, info, sizes[name]) for name, info in self.infos.items()}
        except OSError as error:
            raise SourceNotFoundError(f"{self.path} cannot be read: {error.strerror}; check the path.") from error

    def _size(self, name: str, info: TensorInfo) -> int:
        """The number of bytes of a tensor."""
        if info.type in _PLAIN:
            return math.prod(info.shape) * _PLAIN[info.type].itemsize
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        known = {int(kind): sizes for kind, sizes in GGML_QUANT_SIZES.items()}
        block, size = known.get(info.type, (0, 0))
        if not block or info.shape[-1] % block:
            kind = GGMLQuantizationType(info.type).name if block else f"type {info.type}"
            raise FileFormatError(f"{self.path}: tensor {name!r} of {info.shape} is no {kind}; fetch it again.")
        return math.prod(info.shape) // block * size

    def _tensor(self, file: BinaryIO, name: str, info: TensorInfo, size: int) -> Tensor:
        file.seek(info.start)
        content = bytearray(file.read(size))
        if len(content) < size:
            raise FileFormatError(f"{self.path} has changed since it was opened; open it again.")
        if info.type in _PLAIN:
            return torch.frombuffer(content, dtype=_PLAIN[info.type]).reshape(info.shape)
        import numpy as np
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType(info.type)
        rows = np.frombuffer(content, dtype=np.uint8).reshape(*info.shape[:-1], -1)
        try:
            with np.errstate(all="ignore"):
                return torch.from_numpy(dequantize(rows, kind)).reshape(info.shape)
        except NotImplementedError as error:
            raise FileFormatError(f"{self.path}: {name!r} is of {kind.name}, which is not supported.") from error


class _Start:
    """The first part of a file, taken from the front."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self._at = 0

    def parse(self) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
        """The fields and the places of the tensors; raises a ValueError that says what is wrong."""
        if self._take(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version, tensors, fields = self._number("I"), self._number("Q"), self._number("Q")
        if version not in _VERSIONS:
            raise ValueError(f"its version is none of {', '.join(map(str, _VERSIONS))}, or its byte order is another")
        told: dict[str, Any] = {}
        for _ in range(fields):
            name = self._text()
            if name in told:
                raise ValueError(f"the field {name!r} occurs twice")
            told[name] = self._value(self._number("I"))
        infos: dict[str, TensorInfo] = {}
        for _ in range(tensors):
            name = self._text()
            check_name(name)
            if name in infos:
                raise ValueError(f"the tensor {name!r} occurs twice")
            infos[name] = self._info(name)
        alignment = told.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= MAX_HEADER_BYTES:
            raise ValueError(f"its alignment is {alignment!r}")
        first = self._at + -self._at % alignment
        return told, {name: TensorInfo(info.type, info.shape, first + info.start) for name, info in infos.items()}

    def _info(self, name: str) -> TensorInfo:
        """A tensor's place, counted from the first tensor."""
        dimensions = self._number("I")
        if not 0 < dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        if 0 in shape or math.prod(shape) >= 2**48:
            raise ValueError(f"tensor {name!r} has the shape {shape}")
        return TensorInfo(self._number("I"), shape[::-1], self._number("Q"))

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind != _ARRAY:
            raise ValueError(f"a field has the type {kind}")
        inner, length = self._number("I"), self._number("Q")
        if inner in _SCALARS:
            self._take(length * struct.calcsize(_SCALARS[inner]))
        elif inner == _STRING:
            for _ in range(length):
                self._take(self._number("Q"))
        else:
            raise ValueError(f"an array has the type {inner}")
        return None

    def _text(self) -> str:
        return self._take(self._number("Q")).decode()

    def _number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self._take(struct.calcsize(f"<{kind}")))[0]

    def _take(self, count: int) -> bytes:
        taken = self._content[self._at : self._at + count]
        if len(taken) < count:
            raise ValueError("it is cut short, or its first part is too large")
        self._at += count
        return taken
