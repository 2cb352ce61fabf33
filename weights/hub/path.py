"""Places on the Hub: a repository, its revision, a file or folder in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self
from urllib.parse import unquote

from weights.disk.paths import is_inside
from weights.errors import HubError

_REPO = r"(?P<repo_id>\w[\w.-]*/[\w.-]+)"
_REVISION = r"(?P<revision>refs/(?:pr|convert)/[^/]+|[^/]+)"
_SHORT = re.compile(rf"{_REPO}(?:@(?P<revision>[^:]+))?(?::(?P<path>.+))?", re.ASCII | re.DOTALL)
_ALONE = re.compile(r"(?P<repo_id>\w[\w.-]*)(?:@(?P<revision>[^:]+))?", re.ASCII)
_URI = re.compile(rf"hf://{_REPO}(?:@{_REVISION})?(?:/(?P<path>.*))?", re.ASCII | re.DOTALL)
_PAGE = re.compile(rf"/{_REPO}(?:/(?:blob|resolve|tree)/{_REVISION}(?:/(?P<path>[^?#]*))?)?/?(?:[?#].*)?", re.ASCII)
_REPO_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_LONGEST = 96  # letters of an id
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubPath:
    """A place on the Hub.

    Attributes:
        repo_id: `user/repo`, or `repo` for the few that have no user.
        revision: A branch, a tag or a commit; None is the main branch.
        path: A file or a folder in the repository; empty is all of it.
    """

    repo_id: str
    revision: str | None = None
    path: str = ""

    @classmethod
    def parse(cls, source: str, revision: str | None = None) -> Self | None:
        """Parse a place on the Hub; None for a string that has none of its forms.

        The forms are `user/repo`, `user/repo@revision`, `user/repo:folder/file`, `user/repo@revision:folder/file`,
        `hf://user/repo@revision/folder/file`, and the address of a page at the Hub.

        Raises:
            HubError: The path or the revision could lead elsewhere, or two revisions are named.
        """
        found = _matched(source)
        if found is None or len(found["repo_id"]) > _LONGEST:
            return None
        texts = (found.groupdict().get(key) or "" for key in ("path", "revision"))
        path, named = map(unquote, texts) if "://" in source else texts
        if named and revision and named != revision:
            raise HubError(f"{source} and revision={revision!r} name two revisions; leave one out.")
        path, revision = path.removesuffix("/"), named or revision
        if not all(is_inside(text) for text in (path, revision) if text):
            raise HubError(f"{source!r} does not name a file or folder of a repository; write it as user/repo:path.")
        return cls(found["repo_id"], revision, path)

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a whole commit hash, of which the files never change."""
        return self.revision is not None and is_commit(self.revision)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.repo_id}{revision}{f':{self.path}' if self.path else ''}"


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit hash."""
    return bool(_COMMIT.fullmatch(revision))


def is_repo_id(text: str) -> bool:
    """Whether `text` has the form of a repository's id, `user/repo` or `repo`, and is no path on this machine."""
    return bool(_REPO_ID.fullmatch(text)) and not text.endswith(".safetensors") and not Path(text).exists()


def _matched(source: str) -> re.Match[str] | None:
    if source.startswith("hf://"):
        return _URI.fullmatch(source)
    if not source.startswith(("https://", "http://")):
        found = _SHORT.fullmatch(source)
        # What has no colon and ends like a file is a path on this machine that does not exist.
        return _ALONE.fullmatch(source) if found is None and not source.endswith(".safetensors") else found
    from huggingface_hub import constants

    for site in (constants.ENDPOINT, "https://huggingface.co"):
        if source.startswith(f"{site}/"):
            return _PAGE.fullmatch(source.removeprefix(site))
    return None
