"""Tensors in safetensors files: a lazy read-only mapping, and an atomic save."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import FileIO
from os import PathLike
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from weights.disk.atomic import write_files
from weights.disk.header import DTYPES, METADATA_KEY, Stamp, TensorInfo, check_name
from weights.disk.paths import is_folder
from weights.errors import FileFormatError, SourceNotFoundError
from weights.hub.path import HubPath
from weights.sources import INDEX, TENSORS, find
from weights.tensors.folders import Folder, TensorFile, hub_folder, local_folder

_PIPELINE = "model_index.json"
_SETTINGS = "config.json"
_USUAL = ("model", "diffusion_pytorch_model")  # The others beside them are of other precisions.
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class TensorFiles(Mapping[str, Tensor]):
    """Lazy mapping of tensors by name over one safetensors file or several.

    Example:
        >>> path = weights.save({"fc.weight": torch.ones(3, 2)}, "model.safetensors")
        >>> tensors = weights.open(path)
        >>> tensors.infos["fc.weight"].shape, tensors["fc.weight"].sum()
        ((3, 2), tensor(6.))

    A tensor is a fresh copy in memory: changing it changes no file, and a file cut short later raises an error
    instead of killing the process, as a memory map would.

    Attributes:
        metadata: The text metadata of the file, or of the index of a sharded folder.
        infos: The type (`dtype`) and `shape` of each tensor, by name, known without reading it.
    """

    def __init__(self, files: Iterable[TensorFile], metadata: Mapping[str, str], *, finite: bool = False) -> None:
        self.metadata = dict(metadata)
        self._places = {name: file for file in files for name in file.header.infos}
        self.infos: Mapping[str, TensorInfo] = {name: file.header.infos[name] for name, file in self._places.items()}
        self._finite = finite
        self._held: dict[Path, tuple[FileIO, Stamp]] | None = None

    @property
    def slots(self) -> Mapping[str, TensorInfo]:
        """The former name of `infos`."""
        return self.infos

    @contextmanager
    def held_open(self) -> Iterator[None]:
        """Block in which each file is opened once, however many of its tensors are read.

        Raises:
            FileFormatError: A file was changed meanwhile, and what was read is of no use.
        """
        held: dict[Path, tuple[FileIO, Stamp]] = {}
        self._held = held
        try:
            yield
            for path, (file, stamp) in held.items():
                _check_unchanged(file, path, stamp)
        finally:
            self._held = None
            for file, _ in held.values():
                file.close()

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            KeyError: There is no tensor of this name.
            FileFormatError: The file was changed or cut short since it was opened, or only finite numbers are wanted
                and there are others.
            HubError: The file is on the Hub, and the Hub failed.
        """
        path, stamp = self._places[name].local()
        try:
            if self._held is not None:
                if path not in self._held:
                    self._held[path] = FileIO(path), stamp
                tensor = _read_tensor(self._held[path][0], path, self.infos[name], name)
            else:
                with FileIO(path) as file:
                    tensor = _read_tensor(file, path, self.infos[name], name)
                    _check_unchanged(file, path, stamp)
        except OSError as error:
            raise SourceNotFoundError(f"{path} cannot be read: {error.strerror}; open it again.") from error
        if self._finite and not is_finite(tensor):
            raise FileFormatError(f"{self._places[name]}: tensor {name!r} has NaN or infinity in it; save it again.")
        return tensor

    def __contains__(self, name: object) -> bool:
        return name in self._places  # the inherited one would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        files = sorted({str(file) for file in self._places.values()})
        return f"<{len(self)} tensors in {', '.join(files) or 'no file'}>"


def open_tensors(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    token: str | None = None,
    finite: bool = False,
    max_bytes: int | None = None,
) -> TensorFiles:
    """Open tensors for reading; exported as `weights.open`.

    Example:
        >>> tensors = weights.open("someone/model")
        >>> {name: info.shape for name, info in tensors.infos.items()}
        {'fc.bias': (3,), 'fc.weight': (3, 2)}

    Of several sets of tensors in a folder, `model` or `diffusion_pytorch_model` is the one that is meant.

    Of files on the Hub only the headers are fetched here, and each whole file when the first of its tensors is read.

    Args:
        source: A safetensors file, a folder with one or with shards and their `*.safetensors.index.json`, or a place
            on the Hub with one of these (`"user/repo"`, `"user/repo@revision"`, `"user/repo:folder/file"`).
        revision: Branch, tag or commit, for a place on the Hub.
        token: The Hub token; by default the one `hf auth login` has stored.
        finite: Whether reading a tensor with NaN or infinity in it is an error.
        max_bytes: How many bytes all the tensors may have together; by default any number.

    Raises:
        SourceNotFoundError: There is no such file or folder, or no safetensors file in it.
        FileFormatError: A file is not sound safetensors, or the shards do not fit their index, or they are too large.
        HubError: The Hub failed.
    """
    folder, name = locate_tensors(source, revision, token)
    files, metadata = opened(folder, name or _chosen(folder))
    size = sum(info.stop - info.start for file in files for info in file.header.infos.values())
    if max_bytes is not None and size > max_bytes:
        raise FileFormatError(
            f"{source} has {size:,} bytes of tensors, and {max_bytes:,} are allowed; raise max_bytes."
        )
    return TensorFiles(files, metadata, finite=finite)


def open_parts(
    source: str | PathLike[str], *, revision: str | None = None, token: str | None = None
) -> dict[str, TensorFiles]:
    """Open every component of a pipeline, or a single model under the empty name, as `weights.open` does.

    Example:
        >>> parts = weights.open_parts("someone/pipeline")
        >>> {name: len(tensors) for name, tensors in parts.items()}
        {'text_encoder': 1, 'unet': 2}

    A pipeline is a folder with `model_index.json`, or one that has its tensors in folders only.

    Returns:
        The tensors of each model by the name of its folder, which is empty for the one model of what is no pipeline.

    Raises:
        WeightsError: As `weights.open` does.
    """
    parts = find_parts(*locate_tensors(source, revision, token))
    return {part: TensorFiles(*opened(*place)) for part, place in parts.items()}


def read_settings(source: str | PathLike[str]) -> dict[str, dict[str, Any]]:
    """Settings in `config.json` by component of a pipeline; under the empty name for a single model.

    Raises:
        WeightsError: As `open_parts` does.
    """
    found: dict[str, dict[str, Any]] = {}
    for part, (folder, _) in find_parts(*locate_tensors(source, None, None)).items():
        try:
            content = json.loads(folder.content(_SETTINGS)) if _SETTINGS in folder.names() else {}
        except (ValueError, RecursionError) as error:
            raise FileFormatError(f"{folder}/{_SETTINGS} is not JSON: {error}; fetch or save it again.") from error
        found[part] = content if isinstance(content, dict) else {}
    return found


def find_parts(folder: Folder, name: str) -> dict[str, tuple[Folder, str]]:
    """Folder and tensor file or index of every component of a pipeline, or of a single model under the empty name.

    Args:
        folder: The folder.
        name: The name of the file asked for in it, empty where it was the folder.
    """
    if not name and (_PIPELINE in folder.names() or not has_tensors(folder)):
        inside = {part: below for part, below in sorted(folder.folders().items()) if has_tensors(below)}
        if inside:
            return {part: (below, _chosen(below)) for part, below in inside.items()}
    return {"": (folder, name or _chosen(folder))}


def save(tensors: Mapping[str, Tensor], path: str | PathLike[str], metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file: atomic, synced, with the permissions of the umask, byte-identical for the same input.

    Example:
        >>> model = torch.nn.Linear(2, 3)
        >>> path = weights.save(model.state_dict(), "model.safetensors", {"license": "mit"})
        >>> model.load_state_dict(weights.open(path))
        <All keys matched successfully>

    Tensors may be anywhere in memory, strided and shared (each name gets its own copy). Where `path` is a symbolic
    link, the file it points to is replaced.

    Returns:
        The path as given.

    Raises:
        FileFormatError: A name, a value or the metadata cannot be stored.
        FileWriteError: The system refused to write; the old file is untouched.
    """
    path = Path(path)
    if is_folder(path):
        raise FileFormatError(f"{path} is a folder; give the name of a file in it.")
    write_files({path: encode(tensors, metadata)})
    return path


def encode(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Iterator[bytes | memoryview]:
    """Bytes of a safetensors file in chunks; the input is validated before the first.

    Raises:
        FileFormatError: A name, a value or the metadata cannot be stored.
    """
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    if any(not isinstance(text, str) for item in (metadata or {}).items() for text in item):
        raise FileFormatError("Metadata must be texts by text; convert the other values with str or json.dumps.")
    names, header = encode_header({name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}, metadata)
    return _chunks(header, [tensors[name] for name in names])


def encode_header(
    kinds: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str] | None
) -> tuple[list[str], bytes]:
    """Names of tensors in the order of their bytes in a file, and the header that goes before these.

    Args:
        kinds: The type and the shape of each tensor.
        metadata: Texts by text.
    """
    # Widest types first, which keeps every tensor aligned; then by name, which makes the bytes reproducible.
    names = sorted(kinds, key=lambda name: (-kinds[name][0].itemsize, name))
    fields: dict[str, Any] = {METADATA_KEY: dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        dtype, shape = kinds[name]
        start, end = end, end + math.prod(shape) * dtype.itemsize
        fields[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return names, len(text).to_bytes(8, "little") + text


def locate_tensors(source: str | PathLike[str], revision: str | None, token: str | None) -> tuple[Folder, str]:
    """Folder of a source, local or on the Hub, and the name of the file in it; empty where the source is the folder."""
    place = find(source, revision)
    return hub_folder(place, token) if isinstance(place, HubPath) else local_folder(place)


def _chosen(folder: Folder) -> str:
    """Index of a folder, or else its only tensor file, or of several the one with the default name."""
    names = sorted(folder.names())
    indexes = [name for name in names if name.endswith(INDEX)]
    found = indexes or [name for name in names if name.endswith(TENSORS)]
    if not found:
        raise SourceNotFoundError(f"{folder} holds no safetensors file; check the folder.")
    usual = [name for name in found if name.removesuffix(INDEX).removesuffix(TENSORS) in _USUAL]
    if len(found) > 1 and len(usual) != 1:
        listed = ", ".join(found[:20])
        raise FileFormatError(f"{folder} holds several sets of tensors ({listed}); give the path of one of the files.")
    return usual[0] if usual else found[0]


def has_tensors(folder: Folder) -> bool:
    """Whether there are safetensors files in a folder itself."""
    return any(name.endswith((TENSORS, INDEX)) for name in folder.names())


def opened(folder: Folder, name: str) -> tuple[list[TensorFile], Mapping[str, str]]:
    """Tensor files of a name, itself or the shards of an index, and the metadata.

    An index is `{"metadata": {...}, "weight_map": {tensor name: file name}}`, as transformers writes it.
    """
    if not name.endswith(INDEX):
        file = folder.file(name)
        return [file], file.header.metadata
    index = f"{folder}/{name}"
    try:
        fields = json.loads(folder.content(name))
        places = {str(name): str(shard) for name, shard in fields["weight_map"].items()}
        metadata = {str(key): str(value) for key, value in fields.get("metadata", {}).items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"{index} is not an index of safetensors shards; fetch or save it again.") from error
    shards = sorted(set(places.values()))
    for shard in shards:
        # Only a bare name: anything else could lead out of the folder.
        if PurePath(shard).name != shard or "\\" in shard or not shard.endswith(TENSORS):
            raise FileFormatError(f"{index} names {shard!r} as a shard, which is not the name of a file beside it.")
    files = {shard: folder.file(shard) for shard in shards}
    held = [(name, shard) for shard, file in files.items() for name in file.header.infos]
    wrong = sorted({name for name, _ in set(held) ^ set(places.items())})
    if wrong:
        names = ", ".join(wrong[:5])
        raise FileFormatError(
            f"{index} and its shards disagree about {len(wrong)} tensors ({names}); fetch them again."
        )
    return list(files.values()), metadata


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity in it."""
    if tensor.is_floating_point() and tensor.dtype.itemsize == 1:
        tensor = tensor.float()  # torch cannot tell for all types of eight bits
    return not (tensor.is_floating_point() or tensor.is_complex()) or bool(tensor.isfinite().all())


def _read_tensor(file: FileIO, path: Path, info: TensorInfo, name: str) -> Tensor:
    tensor = empty(info.shape, info.dtype, f"{path}: tensor {name!r}")
    read_bytes(file, path, info.start, bytes_of(tensor))
    if info.dtype is torch.bool and tensor.numel() and tensor.view(torch.uint8).max() > 1:
        raise FileFormatError(f"{path}: tensor {name!r} has bytes other than 0 and 1 as booleans; save it again.")
    return tensor


def empty(shape: Sequence[int], dtype: torch.dtype, what: str) -> Tensor:
    """Allocate a tensor; raises a FileFormatError where that fails: a file may claim any shape."""
    try:
        return torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        size = math.prod(shape) * dtype.itemsize
        raise FileFormatError(f"{what} has {size:,} bytes, for which there is no memory; check the file.") from error


def read_bytes(file: FileIO, path: Path, start: int, content: memoryview, stamp: Stamp | None = None) -> None:
    """Read a part of an open file, which begins at the byte `start`.

    Raises:
        OSError: It cannot be read.
        FileFormatError: It was cut short, or it is not what it was at the time of the stamp, if there is one.
    """
    file.seek(start)
    count = 0
    while count < len(content) and (some := file.readinto(content[count:] if count else content)):
        count += some  # A raw read may stop at 2 GiB.
    if count != len(content):
        raise _changed(path)
    if stamp is not None:
        _check_unchanged(file, path, stamp)


def _check_unchanged(file: FileIO, path: Path, stamp: Stamp) -> None:
    if Stamp.of(file) != stamp:
        raise _changed(path)


def _changed(path: Path) -> FileFormatError:
    return FileFormatError(f"{path} has changed since it was opened; open it again.")


def _check_storable(name: Any, tensor: Any) -> None:
    if not isinstance(name, str):
        raise FileFormatError(f"{name!r} is not a text; name every tensor with one.")
    try:
        check_name(name)
    except ValueError as error:
        raise FileFormatError(f"{error}; choose another.") from error
    if not isinstance(tensor, Tensor):
        raise FileFormatError(f"{name!r} is a {type(tensor).__name__}, not a tensor; save tensors only.")
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_meta:
        raise FileFormatError(f"{name!r} is a sparse, nested or meta tensor; make it an ordinary one before saving.")
    if tensor.dtype not in _DTYPE_NAMES:
        raise FileFormatError(f"{name!r} has the type {tensor.dtype}, which safetensors cannot hold; convert it.")


def _chunks(header: bytes, tensors: list[Tensor]) -> Iterator[bytes | memoryview]:
    yield header
    for tensor in tensors:
        if tensor.numel():
            plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
            yield bytes_of(plain)  # `plain` lives until the next chunk.


def bytes_of(tensor: Tensor) -> memoryview:
    """Memory of a contiguous tensor, which must outlive it. Without NumPy, which is optional and has no bfloat16."""
    return memoryview((ctypes.c_ubyte * (tensor.numel() * tensor.itemsize)).from_address(tensor.data_ptr())).cast("B")
