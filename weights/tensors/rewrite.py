"""Rewriting a checkpoint from disk to disk: a few tensors in memory at a time, resumable.

One thread reads, one changes and one writes, and a fourth syncs what is written, into buffers that are used again and
again: fresh memory would cost as much as the copying.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weights.disk.header import TensorInfo
from weights.errors import FileFormatError, SourceNotFoundError, WeightsError
from weights.sources import INDEX, TENSORS
from weights.tensors.folders import Folder, TensorFile
from weights.tensors.open import (
    bytes_of,
    empty,
    encode_header,
    find_parts,
    has_tensors,
    locate_tensors,
    opened,
    read_bytes,
)
from weights.tensors.resume import OneFile, Workspace


@dataclass(frozen=True)
class ByRows:
    """Change of a tensor that is made to some rows at a time, which takes less memory.

    Attributes:
        change: Makes rows of rows, given these and the number of the first; it may write into those it is given.
    """

    change: Callable[[Tensor, int], Tensor]


Change = Callable[[Tensor], Tensor] | ByRows
"""Makes one tensor of another, of the same shape; it may write into the one it is given, and return that."""

_BUFFERS = 4  # one that is read, one that is changed, one that is written, and one that waits
_WAITING = 1 << 26  # bytes for more of them, where they are small: no thread should wait for another
_AT_ONCE = 1 << 23  # bytes of tensors that are copied
_UNSYNCED = 1 << 27  # bytes that may be written before the disk is waited for

# What a model needs beside its tensors, to be loaded from a folder: settings, vocabularies, its own code.
_BESIDE = ("*.json", "*.jinja", "*.model", "*.py", "*.spm", "*.tiktoken", "*.txt", "LICENSE*", "NOTICE*")
_PICKLES = ("*.bin", "*.ckpt", "*.msgpack", "*.pt", "*.pth")


def rewrite(
    source: str | PathLike[str],
    destination: str | PathLike[str],
    changes: Mapping[str, Change],
    *,
    key: str = "",
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Copy a checkpoint with some tensors changed, a few of them in memory at a time.

    Example:
        >>> path = weights.rewrite("someone/model", "scaled", {"fc.weight": lambda weight: weight * 2})
        >>> torch.equal(weights.open(path)["fc.weight"], 2 * weights.open("someone/model")["fc.weight"])
        True

    Tensors without a change are copied as bytes. What is written appears under its name when all of it is on the disk.
    Until then it is in a hidden folder beside the destination, and the same call goes on there after it was cut off;
    a call with another source, key or layout starts from the beginning.

    Args:
        source: As of `weights.open_parts`: of a pipeline, all models are written.
        destination: The name of a `.safetensors` file, which is replaced if it exists; or that of a new folder, where
            the files that belong to the tensors, such as settings and vocabularies, go too if the source is a folder.
        changes: By the names of tensors, with that of their model and a dot in front in a pipeline.
        key: Equal for calls with the same changes.
        dtype: What floating-point tensors are converted to; by default they stay as they are.
        max_shard_size: How many bytes of tensors a file may have, if it has more than one tensor; by default the
            files are those of the source, or the one that `destination` names.
        progress: Called with the number of bytes that are written, and that of all.

    Returns:
        The path as given.

    Raises:
        KeyError: There is a change for a tensor that is not in the source.
        WeightsError: The source cannot be read, or the destination not written. What was there is kept.
    """
    destination = Path(destination)
    folder, name = locate_tensors(source, None, None)
    plan = _plan(folder, name, destination, dtype, max_shard_size)
    if unknown := changes.keys() - {tensor.name for output in plan.outputs for tensor in output.tensors}:
        raise KeyError(f"{source} has no tensor {', '.join(sorted(unknown))}.")
    single = destination.suffix == TENSORS
    with Workspace(destination, single, _fingerprint(plan, key, changes)) as workspace:
        _pump(plan, changes, workspace, progress or (lambda done, total: None))
        workspace.finish([output.path for output in plan.outputs], plan.beside)
    return destination


# What is to be written


@dataclass(frozen=True)
class _Tensor:
    """Tensor of the source, and its dtype in the output."""

    name: str
    file: TensorFile
    info: TensorInfo
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Its size in bytes in the output."""
        return math.prod(self.info.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class _Output:
    """File to write: its path in the destination, its header, and its tensors in the order of their bytes."""

    path: str
    header: bytes
    tensors: Sequence[_Tensor]

    @classmethod
    def of(cls, path: str, tensors: Mapping[str, _Tensor], metadata: Mapping[str, str]) -> _Output:
        """Output file of tensors by name."""
        names, header = encode_header({name: (t.dtype, t.info.shape) for name, t in tensors.items()}, metadata)
        return cls(path, header, [tensors[name] for name in names])

    @property
    def size(self) -> int:
        return len(self.header) + sum(tensor.size for tensor in self.tensors)


@dataclass
class _Plan:
    """Plan of all files to write; files other than safetensors with their content or the path of it."""

    outputs: list[_Output] = field(default_factory=list)
    beside: dict[str, bytes | Path] = field(default_factory=dict)


def _plan(folder: Folder, name: str, destination: Path, dtype: torch.dtype | None, max_shard_size: int | None) -> _Plan:
    parts = find_parts(folder, name)
    plan = _Plan()
    single = destination.suffix == TENSORS
    if single and "" not in parts:
        raise FileFormatError(f"{destination} is one file, and {folder} has several models: give the name of a folder.")
    if single and max_shard_size is not None:
        raise FileFormatError(f"{destination} is one file: give the name of a folder, or no size of shards.")
    for part, (inside, tensors) in parts.items():
        _plan_part(plan, part, inside, tensors, destination.name if single else "", dtype, max_shard_size)
    if not (single or name):
        plan.beside |= _beside(folder, parts.keys(), dtype, whole="" not in parts)
    return plan


def _plan_part(
    plan: _Plan,
    part: str,
    folder: Folder,
    name: str,
    alone: str,
    dtype: torch.dtype | None,
    max_shard_size: int | None,
) -> None:
    """Outputs of one component, a single file if that has a name."""
    front, dot = (f"{part}/", f"{part}.") if part else ("", "")
    files, _ = opened(folder, name)

    def tensors_of(file: TensorFile) -> dict[str, _Tensor]:
        infos = sorted(file.header.infos.items(), key=lambda item: item[1].start)
        return {
            own: _Tensor(f"{dot}{own}", file, info, dtype if dtype and info.dtype.is_floating_point else info.dtype)
            for own, info in infos
        }

    shards = {file.name: tensors_of(file) for file in files}
    whole = {own: tensor for shard in shards.values() for own, tensor in shard.items()}
    texts = {file.name: file.header.metadata for file in files}
    indexed = name.endswith(INDEX)
    stem = name.removesuffix(INDEX).removesuffix(TENSORS)
    if alone:
        shards, indexed = {alone: whole}, False
    elif max_shard_size is not None:
        shards = _split(whole, stem, max_shard_size)
        indexed = len(shards) > 1
    for shard, inside in shards.items():
        plan.outputs.append(_Output.of(front + shard, inside, texts.get(shard, files[0].header.metadata)))
    if indexed:
        known: dict[str, Any] = json.loads(folder.content(name)).get("metadata", {}) if name.endswith(INDEX) else {}
        known["total_size"] = sum(tensor.size for tensor in whole.values())
        places = {own: shard for shard, inside in shards.items() for own in inside}
        text = json.dumps({"metadata": known, "weight_map": dict(sorted(places.items()))}, indent=2) + "\n"
        plan.beside[f"{front}{stem}{INDEX}"] = text.encode()


def _split(tensors: Mapping[str, _Tensor], stem: str, most: int) -> dict[str, dict[str, _Tensor]]:
    """Tensors distributed over files of a maximal size in bytes, in their order."""
    shards: list[dict[str, _Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.size > most:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.size
    if len(shards) == 1:
        return {f"{stem}{TENSORS}": shards[0]}
    return {f"{stem}-{number:05}-of-{len(shards):05}{TENSORS}": shard for number, shard in enumerate(shards, start=1)}


def _beside(
    folder: Folder, parts: Collection[str], dtype: torch.dtype | None, whole: bool, front: str = ""
) -> dict[str, bytes | Path]:
    """Files beside the tensors by path, in sub-folders too unless these hold another model."""
    found: dict[str, bytes | Path] = {}
    folders = folder.folders()
    names = [name for name in folder.names() if name not in folders]
    if front:  # Links further down may lead around in circles.
        folders = folder.folders(linked=False)
    if whole and front and not has_tensors(folder) and any(_matches(name, _PICKLES) for name in names):
        raise FileFormatError(f"{folder} has its tensors in a pickle: save it as safetensors first.")
    for name in sorted(names):
        if name.startswith(".") or name.endswith(".index.json") or not _matches(name, _BESIDE):
            continue
        content = dtype is not None and name == "config.json"
        found[front + name] = _with_dtype(folder.content(name), dtype) if content else folder.local(name)
    for name, below in sorted(folders.items()):
        if not name.startswith(".") and (name in parts or not has_tensors(below)):
            found |= _beside(below, (), dtype, whole, f"{front}{name}/")
    return found


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _with_dtype(content: bytes, dtype: torch.dtype | None) -> bytes:
    """Settings with another dtype, where they name one."""

    def changed(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        own = str(dtype).removeprefix("torch.")
        return {
            name: own if name in ("dtype", "torch_dtype") and isinstance(inside, str) else changed(inside)
            for name, inside in value.items()
        }

    return json.dumps(changed(json.loads(content)), indent=2, ensure_ascii=False).encode() + b"\n"


def _fingerprint(plan: _Plan, key: str, changes: Mapping[str, Change]) -> str:
    """Fingerprint of a call, equal for calls that write the same bytes."""
    sources = {str(path): str(stamp) for output in plan.outputs for path, stamp in _sources(output)}
    outputs = {output.path: hashlib.sha256(output.header).hexdigest() for output in plan.outputs}
    known = [key, torch.__version__, sorted(changes), sorted(sources.items()), sorted(outputs.items())]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def _sources(output: _Output) -> list[tuple[Path, object]]:
    files = {id(tensor.file): tensor.file for tensor in output.tensors}
    return [file.local() for file in files.values()]


# Writing it


@dataclass(frozen=True)
class _Piece:
    """Piece of the output: a header, a tensor, or a part of a copied tensor.

    Attributes:
        path: The file to write.
        start: Where the bytes go in it.
        size: How many they are.
        end: How many bytes of all files are written with these.
        content: The bytes, if they are known.
        tensor: Where they come from, if they are not.
        shape: The shape of what is read there.
        offset: From which byte of the tensor on it is read.
        row: From which row on, if it is changed by rows.
        change: What becomes of the tensor.
    """

    path: str
    start: int
    size: int
    end: int
    content: bytes = b""
    tensor: _Tensor | None = None
    shape: tuple[int, ...] = ()
    offset: int = 0
    row: int = 0
    change: Change | None = None

    @property
    def to_read(self) -> int:
        """Number of bytes to read."""
        return 0 if self.tensor is None else math.prod(self.shape) * self.tensor.info.dtype.itemsize


def _pieces(plan: _Plan, changes: Mapping[str, Change]) -> Iterator[_Piece]:
    total = 0
    for output in plan.outputs:
        at = len(output.header)
        total += at
        yield _Piece(output.path, 0, at, total, content=output.header)
        for tensor in output.tensors:
            change = changes.get(tensor.name)
            for offset, row, shape in _shapes(tensor.info, change):
                size = math.prod(shape) * tensor.dtype.itemsize
                total += size
                yield _Piece(output.path, at, size, total, b"", tensor, shape, offset, row, change)
                at += size


def _shapes(info: TensorInfo, change: Change | None) -> Iterator[tuple[int, int, tuple[int, ...]]]:
    """Parts of a tensor that are read at once, each with its first byte, its first row and its shape."""
    count = math.prod(info.shape)
    if change is not None and not (isinstance(change, ByRows) and count):
        yield 0, 0, info.shape
        return
    rows, inside = (info.shape[0], info.shape[1:]) if change is not None else (count, ())
    row_bytes = math.prod(inside) * info.dtype.itemsize
    most = max(1, _AT_ONCE // row_bytes)
    for row in range(0, rows, most):
        yield row * row_bytes, row, (min(most, rows - row), *inside)


def _pump(
    plan: _Plan, changes: Mapping[str, Change], workspace: Workspace, progress: Callable[[int, int], None]
) -> None:
    """Write the remaining pieces; reading, changing, writing and syncing overlap in threads."""
    done = synced = workspace.done
    left = [piece for piece in _pieces(plan, changes) if piece.end > done]
    total = sum(output.size for output in plan.outputs)
    size = max((piece.to_read for piece in left), default=0)
    count = max(_BUFFERS, _WAITING // max(size, _AT_ONCE))
    free = [empty([size], torch.uint8, "A tensor that is read") for _ in range(count)]
    pieces = iter(left)
    reads: deque[tuple[_Piece, Tensor, Future[None]]] = deque()
    writes: deque[tuple[_Piece, Tensor, Future[None]]] = deque()
    unsynced: dict[str, None] = {}
    sync: Future[None] | None = None
    progress(done, total)
    with (
        _Reader() as reader,
        workspace.writer() as writer,
        ThreadPoolExecutor(1) as reading,
        ThreadPoolExecutor(1) as writing,
        ThreadPoolExecutor(1) as syncing,
    ):

        def read_ahead() -> None:
            while free and (piece := next(pieces, None)) is not None:
                buffer = free.pop()
                reads.append((piece, buffer, reading.submit(reader.read, piece, buffer)))

        read_ahead()
        while reads or writes:
            if reads:
                piece, buffer, future = reads.popleft()
                future.result()
                content = _content(piece, buffer)
                writes.append((piece, buffer, writing.submit(writer.write, piece.path, piece.start, content)))
            else:
                writes[0][2].result()
            while writes and writes[0][2].done():
                piece, buffer, future = writes.popleft()
                future.result()
                free.append(buffer)
                unsynced[piece.path] = None
                done = piece.end
                progress(done, total)
            if done - synced >= _UNSYNCED and (sync is None or sync.done()):
                if sync is not None:
                    sync.result()
                sync = syncing.submit(workspace.sync, [*unsynced], done)
                synced, unsynced = done, {}
            read_ahead()
        if sync is not None:
            sync.result()
    workspace.sync([*unsynced], done)


def _content(piece: _Piece, buffer: Tensor) -> bytes | Tensor:
    """Bytes to write for a piece that was read."""
    if piece.tensor is None:
        return piece.content
    read = buffer[: piece.to_read].view(piece.tensor.info.dtype).view(piece.shape)
    tensor = _made(read, piece)
    if tensor.shape != read.shape:
        raise ValueError(f"{piece.tensor.name} may not become a tensor of shape {tuple(tensor.shape)}.")
    result = tensor.to(piece.tensor.dtype)
    if result is not tensor and _infinities(result) > _infinities(tensor):
        raise FileFormatError(f"{piece.tensor.name} has numbers that are too large for {result.dtype}; choose another.")
    return result.contiguous()


def _made(read: Tensor, piece: _Piece) -> Tensor:
    """Changed tensor, or its changed rows."""
    if piece.change is None:
        return read
    return piece.change.change(read, piece.row) if isinstance(piece.change, ByRows) else piece.change(read)


def _infinities(tensor: Tensor) -> int:
    # torch cannot tell for all types of eight bits
    return int((tensor.float() if tensor.dtype.itemsize == 1 else tensor).isinf().sum())


class _Reader(OneFile):
    """Reader of parts of files."""

    def read(self, piece: _Piece, buffer: Tensor) -> None:
        """Read the bytes of a piece."""
        if piece.tensor is None:
            return
        path, stamp = piece.tensor.file.local()
        try:
            start = piece.tensor.info.start + piece.offset
            read_bytes(self.at(path), path, start, bytes_of(buffer[: piece.to_read]), stamp)
        except OSError as error:
            if isinstance(error, WeightsError):
                raise
            raise SourceNotFoundError(f"{path} cannot be read: {error.strerror}; open it again.") from error
