"""Snapshots of repositories on the Hub, and checked downloads."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from weights.disk.atomic import write_files
from weights.disk.paths import is_inside
from weights.errors import FileWriteError, HubError
from weights.hub.errors import hub_errors
from weights.hub.path import HubPath, is_commit

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


# huggingface_hub is imported inside the functions: it takes 0.3 s, and most work is on local files.

SAFE_FILES = ("*.safetensors", "*.json", "*.md", "*.txt", "*.model")
_TIMEOUT = 10.0  # seconds
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: str | Sequence[str] | None = None,
) -> Path:
    """Download a repository's files into the Hub's cache and check each against its published hash.

    Example:
        >>> folder = weights.download("someone/style-lora", revision="main")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'adapter_config.json', 'adapter_model.safetensors']

    What is in the cache already is not fetched again, and for a whole commit hash the Hub is not even asked. Where the
    Hub cannot be reached or refuses, files that are in the cache are returned, checked, as they are.

    Args:
        repo_id: `"user/repo"`, `"user/repo@revision"`, `"user/repo:folder"`, an `hf://` URL, or the address of a page.
        revision: Branch, tag or commit; by default the main branch.
        token: The Hub token; by default the one `hf auth login` has stored.
        allow_patterns: A glob of the files wanted, or several; by default tensors in safetensors, and texts. Never a
            pickle unless it is asked for here, or by its name.

    Returns:
        The folder of the snapshot, or the file or folder in it that was asked for.

    Raises:
        HubError: The Hub failed, or sent a file that does not fit its hash; that file does not stay in the cache.
        FileWriteError: The cache cannot be written.
    """
    place = HubPath.parse(repo_id, revision)
    if place is None:
        raise HubError(f"{repo_id!r} is not a repository id; write it as user/repo.")
    patterns = [allow_patterns] if isinstance(allow_patterns, str) else list(allow_patterns or SAFE_FILES)
    snapshot = Snapshot.of(place, token)
    if place.path in snapshot.files:
        wanted = [place.path]
    else:
        inside = snapshot.inside(place.path)
        wanted = [path for name, path in inside.items() if any(fnmatch(name, pattern) for pattern in patterns)]
    if not wanted:
        raise HubError(f"{place} has no file like {', '.join(patterns)}; check that it is the right repository.")
    return snapshot.fetch(wanted) / place.path


@dataclass(frozen=True)
class HubFile:
    """File in a repository: its size in bytes and its published hash, empty where only the cache was asked."""

    size: int
    hash: str


@dataclass(frozen=True)
class Snapshot:
    """Files of a repository at one commit.

    Attributes:
        place: What was asked for.
        commit: The hash of the commit.
        files: What is in it, by path.
        token: The Hub token.
        reached: Whether the Hub was asked, not only the cache.
    """

    place: HubPath
    commit: str
    files: Mapping[str, HubFile]
    token: str | None = field(repr=False)
    reached: bool

    @classmethod
    def of(cls, place: HubPath, token: str | None) -> Snapshot:
        """Snapshot of a place on the Hub, from the cache where the Hub fails or need not be asked.

        Raises:
            HubError: The Hub failed, and there is nothing in the cache.
        """
        token = token or stored_token()
        with hub_errors(place.repo_id, token):
            known = _listed_in_cache(place, token) if place.is_pinned else None
            if known is not None:
                return known
            try:
                commit = str(head(place.repo_id, place.revision, token).sha)
                if not is_commit(commit):
                    raise HubError(f"{place.repo_id}: what answered is no Hub; check HF_ENDPOINT.")
                snapshot = cls(place, commit, published_files(place.repo_id, commit, token), token, reached=True)
            except Exception:
                known = _listed_in_cache(place, token) or _present_in_cache(place, token)
                if known is None:
                    raise
                return known
        _remember(place, commit)
        return snapshot

    @property
    def folder(self) -> Path:
        """The folder of the snapshot in the client's cache, downloaded or not."""
        return _storage(self.place.repo_id) / "snapshots" / self.commit

    def inside(self, folder: str) -> dict[str, str]:
        """The paths of the files in a folder, by their paths from there."""
        start = f"{folder}/" if folder else ""
        return {path.removeprefix(start): path for path in self.files if path.startswith(start)}

    def fetch(self, paths: Collection[str]) -> Path:
        """Download some of its files, unless they are in the cache, and check them. Returns the folder of all.

        Raises:
            HubError: The Hub failed, or a file does not fit its hash; that file does not stay in the cache.
            FileWriteError: The cache cannot be written.
        """
        if not all((self.folder / path).is_file() for path in paths):
            self._download(paths)
        for path in paths:
            self._check(path)
        return self.folder

    def read(self, path: str, start: int, stop: int) -> bytes:
        """Read a range of bytes of a file, without downloading the rest.

        Raises:
            HubError: The Hub failed, or sent something else.
        """
        from huggingface_hub import get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        cached = self.folder / path
        if cached.is_file():
            with cached.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        content = bytearray()
        with hub_errors(self.place.repo_id, self.token):
            url = hf_hub_url(self.place.repo_id, path, revision=self.commit)
            headers = build_hf_headers(token=self.token) | {
                "Range": f"bytes={start}-{stop - 1}",
                "Accept-Encoding": "identity",
            }
            with get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT) as response:
                hf_raise_for_status(response)
                first = start if response.status_code == 206 else 0  # Some send all of it, whatever is asked for.
                for chunk in response.iter_bytes():
                    content += chunk
                    if len(content) >= stop - first:  # More is not read.
                        break
        part = bytes(content[start - first : stop - first])
        if len(part) < stop - start:
            raise HubError(f"{self.place.repo_id}: the Hub did not send the part of {path} asked for; try again.")
        return part

    def _download(self, paths: Collection[str]) -> None:
        from huggingface_hub import snapshot_download

        try:
            with hub_errors(self.place.repo_id, self.token):
                if not self.reached:  # Fails at once, where the client would try for half a minute.
                    head(self.place.repo_id, self.commit, self.token)
                snapshot_download(
                    self.place.repo_id,
                    revision=self.commit,
                    token=self.token,
                    allow_patterns=[glob.escape(path) for path in paths],
                )
        finally:  # The client leaves a list of files that it could not write, or that it was killed over.
            for cut_off in (_storage(self.place.repo_id) / "trees").glob("*.tmp"):
                with contextlib.suppress(OSError):
                    cut_off.unlink()

    def _check(self, path: str) -> None:
        file = self.folder / path
        if not file.is_file():
            raise HubError(f"{path} of {self.place.repo_id} did not come; download it again.")
        # The cache names a file's content by its published hash.
        blob = Path(os.readlink(file)).name if file.is_symlink() else ""  # noqa: PTH115 - one link only
        published = self.files[path].hash or (blob if _HASH.fullmatch(blob) else "")
        if published and not fits(file, published):
            _forget(file)
            raise HubError(
                f"{path} of {self.place.repo_id} came damaged, its hash is not the published one; download it again."
            )
        if blob:  # The client begins anew where it was killed, and leaves what it had.
            for cut_off in file.resolve().parent.glob(f"{blob}.*.incomplete"):
                cut_off.unlink(missing_ok=True)


def head(repo_id: str, revision: str | None, token: str | None) -> ModelInfo:
    """Newest commit of a revision. The Hub is asked once, so that an unreachable one is noticed soon."""
    from huggingface_hub import HfApi

    return HfApi(token=token).model_info(repo_id, revision=revision or "main", timeout=_TIMEOUT)


def published_files(repo_id: str, commit: str, token: str | None) -> dict[str, HubFile]:
    """Files of a commit with their hashes: the sha256 of a large one, git's hash of any other.

    Files whose path leads out of the repository are left out.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi(token=token).list_repo_tree(repo_id, recursive=True, revision=commit)
    return {
        file.path: HubFile(file.size, file.lfs.sha256 if file.lfs else file.blob_id)
        for file in tree
        if isinstance(file, RepoFile) and is_inside(file.path)
    }


def stored_token() -> str | None:
    """The token that `hf auth login` has stored, or that HF_TOKEN holds."""
    from huggingface_hub import get_token

    return get_token()


def fits(path: Path, published: str) -> bool:
    """Whether a file has the published hash: 64 digits are its sha256, 40 are git's hash of it as a blob."""
    blob_header = b"" if len(published) == 64 else b"blob %d\0" % path.stat().st_size
    digest = hashlib.new("sha256" if len(published) == 64 else "sha1", blob_header, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == published


def _listed_in_cache(place: HubPath, token: str | None) -> Snapshot | None:
    """The snapshot, where the client has noted in its cache which files are in it."""
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    try:
        tree = get_cached_repo_tree(place.repo_id, revision=place.revision)
    except CachedRepoTreeNotFoundError:
        return None
    files = {file.path: HubFile(file.size, "") for file in tree if is_inside(file.path)}
    return Snapshot(place, _cached_commit(place), files, token, reached=False)


def _present_in_cache(place: HubPath, token: str | None) -> Snapshot | None:
    """The snapshot as far as its files are in the cache."""
    from huggingface_hub.errors import RevisionResolutionError

    try:
        snapshot = Snapshot(place, _cached_commit(place), {}, token, reached=False)
    except RevisionResolutionError:
        return None
    found = {path: path.relative_to(snapshot.folder) for path in snapshot.folder.rglob("*") if path.is_file()}
    files = {name.as_posix(): HubFile(path.stat().st_size, "") for path, name in found.items()}
    return Snapshot(place, snapshot.commit, files, token, reached=False) if files else None


def _cached_commit(place: HubPath) -> str:
    from huggingface_hub import resolve_revision

    return resolve_revision(place.repo_id, revision=place.revision, local_files_only=True).resolved


def _remember(place: HubPath, commit: str) -> None:
    """Note in the cache, as the client does, the commit of a revision: it is needed offline."""
    if not place.is_pinned:
        with suppress(FileWriteError):
            write_files({_storage(place.repo_id) / "refs" / (place.revision or "main"): [commit.encode()]})


def _storage(repo_id: str) -> Path:
    """The folder of a repository in the client's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser().resolve() / f"models--{repo_id.replace('/', '--')}"


def _forget(path: Path) -> None:
    """Remove a file from the Hub's cache: its name in the snapshot, and the content that name links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)
