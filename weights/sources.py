"""Where tensors come from: a path on this machine, or a repository on the Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from weights.errors import SourceNotFoundError
from weights.hub import download

_REPO_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?(@.+)?", re.ASCII)


def is_repo_id(source: str) -> bool:
    """Whether `source` has the form of a Hub id, `user/repo` or `repo`, `@revision` allowed, and is no local path."""
    return bool(_REPO_ID.fullmatch(source)) and not source.endswith(".safetensors") and not Path(source).exists()


def locate(source: str | PathLike[str], *, revision: str | None, token: str | None, patterns: Sequence[str]) -> Path:
    """The local path of `source`: itself where it exists, else a download of the files that match `patterns`.

    Raises:
        SourceNotFoundError: It neither exists nor has the form of a Hub id.
        HubError: The Hub failed.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if isinstance(source, str) and is_repo_id(source):
        return download(source, revision=revision, token=token, allow_patterns=patterns)
    raise SourceNotFoundError(f"{source}: no such file or folder; check the path, or give a Hub id such as user/repo.")
