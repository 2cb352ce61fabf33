"""Sources of tensors: a local path, or a repository on the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path

from weights.adapter_file import CONFIG
from weights.disk.atomic import settle
from weights.errors import FileFormatError, SourceNotFoundError
from weights.hub.download import Snapshot
from weights.hub.path import HubPath

TENSORS = ".safetensors"
INDEX = ".safetensors.index.json"
_PICKLES = (".bin", ".pt")
_BASE_MODEL = re.compile(r"(diffusion_pytorch_)?model\b.*|.*-\d{5}-of-\d{5}")  # of the name, without the ending


def find(source: str | PathLike[str], revision: str | None) -> Path | HubPath:
    """Parse a source: a local path if it exists, else a place on the Hub.

    Renames that a killed writer left unfinished there are finished.

    Raises:
        SourceNotFoundError: It neither exists nor has the form of a place on the Hub.
        HubError: It has, and could lead elsewhere.
        FileWriteError: They cannot be finished.
    """
    path = Path(source).expanduser()
    if _exists(path):
        settle(path if path.is_dir() else path.parent)
        return path
    place = HubPath.parse(source, revision) if isinstance(source, str) else None
    if place is None:
        raise SourceNotFoundError(
            f"{source}: no such file or folder; check the path, or give a Hub id such as user/repo."
        )
    return place


def locate(
    source: str | PathLike[str],
    *,
    revision: str | None,
    token: str | None,
    patterns: Sequence[str],
    max_bytes: int | None = None,
) -> Path:
    """Local path of the adapter at a source: the source itself where it exists, else a download of that adapter alone.

    From a folder of a repository come the files that match `patterns`, or else the only file of tensors that is not
    part of a base model.

    Raises:
        SourceNotFoundError: It neither exists nor has the form of a place on the Hub.
        FileFormatError: The repository has no adapter there, or several; or the files have more bytes than allowed.
        HubError: The Hub failed.
    """
    place = find(source, revision)
    if isinstance(place, Path):
        files = [file for file in place.iterdir() if file.is_file()] if place.is_dir() else [place]
        _check_size(source, sum(file.stat().st_size for file in files), max_bytes)
        return place
    snapshot = Snapshot.of(place, token)
    inside = snapshot.inside(place.path)
    wanted = [path for name, path in inside.items() if "/" not in name and _matches(name, patterns)]
    path = place.path
    if path in snapshot.files or all(file.endswith(".json") for file in wanted):
        path = path if path in snapshot.files else _only_adapter(place, inside, patterns)
        settings = snapshot.inside(path.rpartition("/")[0]).get(CONFIG)
        wanted = [path, *([settings] if settings else [])]
    _check_size(source, sum(snapshot.files[path].size for path in wanted), max_bytes)
    return snapshot.fetch(wanted) / path


def _check_size(source: str | PathLike[str], size: int, allowed: int | None) -> None:
    if allowed is not None and size > allowed:
        raise FileFormatError(f"{source} has {size:,} bytes, and {allowed:,} are allowed; raise max_bytes.")


def _only_adapter(place: HubPath, inside: Mapping[str, str], patterns: Sequence[str]) -> str:
    """The path of the one file in a folder of a repository that may be an adapter."""
    tensors = {name: path for name, path in inside.items() if name.endswith(TENSORS)}
    found = [path for name, path in tensors.items() if "/" not in name and not is_base_model(name)]
    if len(found) == 1:
        return found[0]
    nested = ((name.rpartition("/")[2], path) for name, path in inside.items() if "/" in name)
    deeper = {path.rpartition("/")[0] for name, path in nested if _matches(name, patterns)}
    choices = sorted(found or deeper)
    if choices:
        where = ", ".join(str(HubPath(place.repo_id, place.revision, path)) for path in choices[:20])
        raise FileFormatError(f"{place} has no adapter in one place; give the one you mean: {where}.")
    if tensors:
        raise FileFormatError(f"{place} has the tensors of a model and no adapter; check that it is the right one.")
    if any(name.endswith(_PICKLES) for name in inside):
        raise FileFormatError(
            f"{place} has its tensors in a pickle; read it by weights.read_adapter(..., pickle=True)."
        )
    raise FileFormatError(f"{place} has no safetensors file; check that it is the right place.")


def is_base_model(name: str) -> bool:
    """Whether a tensor file has the name of a whole model, or of a shard."""
    return bool(_BASE_MODEL.fullmatch(name.removesuffix(TENSORS)))


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # too long a name, or one with a NUL
        return False
