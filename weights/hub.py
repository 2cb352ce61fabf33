"""The Hugging Face Hub: checked downloads, and publishing in one commit."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from os import PathLike
from pathlib import Path

from weights.errors import (
    FileFormatError,
    HubAccessError,
    HubConflictError,
    HubConnectionError,
    HubError,
    SourceNotFoundError,
    WeightsError,
)
from weights.header import read_header

# huggingface_hub is imported inside the functions: it takes 0.3 s, and most work is on local files.

_SAFE_FILES = ("*.safetensors", "*.json", "*.md", "*.txt", "*.model")
_CONFIGS = ("adapter_config.json", "config.json")
_TIMEOUT = 10.0  # seconds


def download(
    repo_id: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: Sequence[str] | None = None,
) -> Path:
    """Download a repository's files into the Hub's cache and check each against its published hash.

    Where the Hub cannot be reached or refuses, files that are in the cache already are returned as they are.

    Args:
        repo_id: `"user/repo"` or `"user/repo@revision"`.
        revision: Branch, tag or commit; by default the main branch.
        token: The Hub token; by default the one `hf auth login` has stored.
        allow_patterns: Globs of the files wanted; by default tensors in safetensors, and texts. Never a pickle
            unless it is asked for here.

    Returns:
        The folder of the snapshot.

    Raises:
        HubError: The Hub failed, or sent a file that does not fit its hash; that file does not stay in the cache.
    """
    name, revision = _split_revision(repo_id, revision)
    patterns = list(allow_patterns or _SAFE_FILES)
    with _hub_errors(name):
        from huggingface_hub import snapshot_download

        try:
            head = _Head.fetch(name, revision, token)
            hashes = _hashes(name, head.commit, token)
        except Exception as error:
            cached = _cached(name, revision, patterns)
            if cached is None:
                raise error
            return cached
        wanted = [file for file in hashes if any(fnmatch(file, pattern) for pattern in patterns)]
        if not wanted:
            raise HubError(f"{name} has no file like {', '.join(patterns)}; check that it is the right repository.")
        folder = Path(snapshot_download(name, revision=revision, token=token, allow_patterns=patterns))
        if folder.name != head.commit:
            raise HubConflictError(f"{name} was changed during the download; download it again.")
    for file in wanted:
        if not _fits(folder / file, hashes[file]):
            _forget(folder / file)
            raise HubError(f"{file} of {name} came damaged, its hash is not the published one; download it again.")
    return folder


def publish(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Publish a folder's files (hidden ones left out) in one commit, and check what the Hub then has.

    The folder must hold a `README.md`, an `adapter_config.json` or `config.json`, and at least one safetensors
    file; all must be sound. The repository is made if there is none. Nothing is published over a change that
    somebody else makes meanwhile.

    Args:
        folder: What to publish.
        repo_id: `"user/repo"`.
        private: Whether the repository is private; by default as it is, or as the account makes new ones.
        revision: The branch to commit to; by default the main branch.
        create_pr: Open a pull request instead.
        token: The Hub token; by default the one `hf auth login` has stored.
        commit_message: By default names the folder.

    Returns:
        The URL of the commit.

    Raises:
        SourceNotFoundError: The folder or one of its necessary files is missing.
        FileFormatError: A file in it is not sound.
        HubAccessError: There is no token, or it may not write there.
        HubConflictError: Somebody else changed the repository meanwhile.
        HubError: The Hub failed otherwise, or has not got what was sent.
    """
    root = Path(folder)
    files = _publishable(root)
    with _hub_errors(repo_id):
        from huggingface_hub import CommitOperationAdd, HfApi, get_token

        token = token or get_token()
        if token is None:
            raise HubAccessError(
                f"Publishing to {repo_id} needs a token; run `hf auth login`, set HF_TOKEN or pass token=."
            )
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        before = _Head.fetch(repo_id, revision, token)
        if private is not None and before.private is not None and before.private != private:
            actual = "private" if before.private else "public"
            raise HubError(f"{repo_id} exists and is {actual}; change that in its settings, or leave out private=.")
        commit = api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
            commit_message=commit_message or f"Upload {root.resolve().name}",
            revision=revision,
            create_pr=create_pr,
            parent_commit=before.commit,
        )
        published = _hashes(repo_id, commit.pr_revision or commit.oid, token)
    damaged = [name for name, path in files.items() if not _fits(path, published.get(name, ""))]
    if damaged:
        raise HubError(f"{repo_id} does not have what was sent as {', '.join(damaged)}; publish it again.")
    return commit.commit_url


@dataclass(frozen=True)
class _Head:
    """The newest commit of a revision, and whether the repository is private, where the Hub says so."""

    commit: str | None
    private: bool | None

    @classmethod
    def fetch(cls, repo_id: str, revision: str | None, token: str | None) -> _Head:
        from huggingface_hub import HfApi

        info = HfApi(token=token).model_info(repo_id, revision=revision, timeout=_TIMEOUT)
        return cls(info.sha, info.private)


def _hashes(repo_id: str, commit: str | None, token: str | None) -> dict[str, str]:
    """The published hash of each file of a commit: sha256 of a large file, else git's."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi(token=token).list_repo_tree(repo_id, recursive=True, revision=commit)
    return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in tree if isinstance(file, RepoFile)}


def _cached(repo_id: str, revision: str | None, patterns: list[str]) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None


def _split_revision(repo_id: str, revision: str | None) -> tuple[str, str | None]:
    name, _, suffix = repo_id.partition("@")
    if suffix and revision and suffix != revision:
        raise HubError(f"{repo_id} and revision={revision!r} name two revisions; leave one out.")
    return name, suffix or revision


def _publishable(folder: Path) -> dict[str, Path]:
    """The files of `folder` by their names in the repository, checked."""
    if not folder.is_dir():
        raise SourceNotFoundError(f"{folder} is not a folder; save the adapter into one first.")
    relative = {path.relative_to(folder): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {
        name.as_posix(): path for name, path in relative.items() if not any(part.startswith(".") for part in name.parts)
    }
    tensors = [path for name, path in files.items() if name.endswith(".safetensors")]
    missing = [
        what
        for what, there in {
            "README.md": "README.md" in files,
            " or ".join(_CONFIGS): any(name in files for name in _CONFIGS),
            "a safetensors file": bool(tensors),
        }.items()
        if not there
    ]
    if missing:
        raise SourceNotFoundError(f"{folder} lacks {', '.join(missing)}; save the adapter into it first.")
    for path in files.values():
        if not path.stat().st_size:
            raise FileFormatError(f"{path} is empty; save it again or remove it.")
    for path in tensors:
        read_header(path)
    return files


def _fits(path: Path, published: str) -> bool:
    """Whether a file has the published hash: 64 digits are its sha256, 40 are git's hash of it as a blob."""
    blob_header = b"" if len(published) == 64 else b"blob %d\0" % path.stat().st_size
    digest = hashlib.new("sha256" if len(published) == 64 else "sha1", blob_header, usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == published


def _forget(path: Path) -> None:
    """Remove a file from the Hub's cache: its name in the snapshot, and the content that name links to."""
    path.resolve().unlink(missing_ok=True)
    path.unlink(missing_ok=True)


@contextmanager
def _hub_errors(repo_id: str) -> Iterator[None]:
    """Turn whatever the Hub's client raises, of which there are many unrelated types, into one HubError."""
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        raise _translated(error, repo_id) from error


def _translated(error: BaseException, repo_id: str) -> HubError:
    """The HubError for `error`, found from what caused it: the client wraps refusals in unrelated errors."""
    cause: BaseException | None = error
    while cause is not None:
        known = _known(cause, repo_id)
        if known is not None:
            return known
        cause = cause.__cause__
    return HubError(f"{repo_id}: the Hub's client failed with {type(error).__name__}: {_first_line(error)}")


def _known(error: BaseException, repo_id: str) -> HubError | None:
    import httpx2
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return HubAccessError(
                f"{repo_id} is gated; accept its terms at {constants.ENDPOINT}/{repo_id}, then run `hf auth login`"
                " or pass token=."
            )
        case errors.RepositoryNotFoundError():
            return HubAccessError(
                f"{repo_id} is neither a local path nor a repository this token can see; check the spelling, or run"
                " `hf auth login` if it is private."
            )
        case errors.RevisionNotFoundError():
            return HubError(f"{repo_id} has no such revision; check the branch, tag or commit.")
        case errors.HFValidationError():
            return HubError(f"{repo_id!r} is not a repository id; write it as user/repo.")
        case errors.OfflineModeIsEnabled():
            return HubConnectionError(f"{repo_id} needs the Hub, and its offline mode is on; unset HF_HUB_OFFLINE.")
        case errors.HfHubHTTPError():
            return _refusal(error.response.status_code, _first_line(error), repo_id)
        case httpx2.TransportError():
            return HubConnectionError(
                f"{repo_id}: the Hub at {constants.ENDPOINT} cannot be reached; check the network and HF_ENDPOINT."
            )
    return None


def _refusal(status: int, message: str, repo_id: str) -> HubError:
    match status:
        case 401 | 403:
            return HubAccessError(
                f"{repo_id}: the token may not do this; run `hf auth login`, set HF_TOKEN or pass token= with one that"
                " may."
            )
        case 412:
            return HubConflictError(f"{repo_id} was changed by somebody else meanwhile; look at it and try again.")
    return HubError(f"{repo_id}: the Hub answered {status}: {message}")


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
