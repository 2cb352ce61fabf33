"""Publishing on the Hugging Face Hub: checked before, in one commit, and checked after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from weights.adapter_file import CONFIG
from weights.disk.header import Stamp, read_header
from weights.disk.paths import is_inside
from weights.errors import FileFormatError, HubAccessError, HubConnectionError, HubError, SourceNotFoundError
from weights.hub.card import CARD, check_card
from weights.hub.download import HubFile, Snapshot, fits, head, published_files, stored_token
from weights.hub.errors import hub_errors
from weights.hub.path import HubPath

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo


# huggingface_hub is imported inside the functions: it takes 0.3 s, and most work is on local files.

_PICKLES = (".bin", ".ckpt", ".pickle", ".pkl", ".pt", ".pth")


def publish(
    folder: str | PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    token: str | None = None,
    commit_message: str | None = None,
    dry_run: bool = False,
) -> str:
    """Publish a folder's files (hidden ones left out) in one commit, and check what the Hub then has.

    Example:
        >>> print(weights.publish("out", "me/style-lora", dry_run=True))
        Would publish 3 files to me/style-lora, main (a new repository): ...
        >>> url = weights.publish("out", "me/style-lora", private=True)

    The folder must hold a `README.md` and at least one safetensors file; all must be sound, and none a pickle or a
    link that leads out of it. The repository is made if there is none, and so is the branch. Nothing is published
    over a change that somebody else makes meanwhile.

    Args:
        folder: What to publish.
        repo_id: `"user/repo"`.
        private: Whether the repository is private; by default as it is, or as the account makes new ones.
        revision: The branch to commit to; by default the main branch.
        create_pr: Open a pull request instead.
        token: The Hub token; by default the one `hf auth login` has stored.
        commit_message: By default names the folder.
        dry_run: Send nothing, and say what would be sent.

    Returns:
        The URL of the commit; for a dry run, a text with the files and the model card.

    Raises:
        SourceNotFoundError: The folder or one of its necessary files is missing.
        FileFormatError: A file in it is not sound, or must not be published.
        HubAccessError: There is no token, or it may not write there.
        HubConflictError: Somebody else changed the repository meanwhile.
        HubError: The Hub failed otherwise, or has not got what was sent.
    """
    root = Path(folder)
    stamps = {path: _stamp(path) for path in files_in(root).values()}
    files = _publishable(root)
    token = token or stored_token()
    if dry_run:
        return _plan(files, repo_id, revision, token)
    if token is None:
        raise HubAccessError(
            f"Publishing to {repo_id} needs a token; run `hf auth login`, set HF_TOKEN or pass token=."
        )
    target = _Target(repo_id, revision, token)
    with hub_errors(repo_id, token):
        from huggingface_hub import CommitOperationAdd, HfApi

        before = target.prepare(private=private, create_pr=create_pr)
        with target.explained():
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()]
            for operation in operations:
                _ = operation.upload_info.sha256  # Or else it is what the file has when it is sent.
            _check_unchanged(stamps)  # So what was hashed is what was checked, and the Hub takes nothing else.
            commit = HfApi(token=token).create_commit(
                repo_id,
                operations,
                commit_message=commit_message or f"Upload {root.resolve().name}",
                revision=revision,
                create_pr=create_pr,
                parent_commit=before.sha,
            )
    _check_unchanged(stamps)
    _verify(files, HubPath(repo_id, commit.oid), str(commit.pr_url or commit.commit_url), token)
    return str(commit.commit_url)


@dataclass
class _Target:
    """Destination of a commit, and the repository or branch that was made for it."""

    repo_id: str
    revision: str | None
    token: str = field(repr=False)
    made: str = ""

    def prepare(self, *, private: bool | None, create_pr: bool) -> ModelInfo:
        """Make the repository and the branch where there are none. Returns the newest commit of the branch."""
        from huggingface_hub import HfApi, errors

        api = HfApi(token=self.token)
        try:
            found = head(self.repo_id, None, self.token)
        except errors.GatedRepoError:
            raise
        except errors.RepositoryNotFoundError:
            api.create_repo(self.repo_id, private=private, exist_ok=True)
            self.made = f"The new repository {self.repo_id} was made before that, and stays."
            with self.explained():
                found = head(self.repo_id, None, self.token)
        if private is not None and found.private is not None and found.private != private:
            actual = "private" if found.private else "public"
            raise HubError(
                f"{self.repo_id} exists and is {actual}; change that in its settings, or leave out private=."
            )
        if self.revision is None:
            return found
        with self.explained():
            try:
                return head(self.repo_id, self.revision, self.token)
            except errors.RevisionNotFoundError:
                if create_pr:
                    raise
            api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
            self.made = f"{self.made} The new branch {self.revision} was made before that, and stays.".strip()
            return head(self.repo_id, self.revision, self.token)

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Block that adds to an error which repository or branch was made before it."""
        try:
            with hub_errors(self.repo_id, self.token):
                yield
        except HubError as error:
            if not self.made:
                raise
            raise type(error)(f"{error} {self.made}") from error


def _stamp(path: Path) -> Stamp | None:
    try:
        with path.open("rb") as file:
            return Stamp.of(file)
    except OSError:
        return None


def _check_unchanged(stamps: Mapping[Path, Stamp | None]) -> None:
    for path, stamp in stamps.items():
        if _stamp(path) != stamp:
            raise FileFormatError(f"{path} was changed while it was published; publish it again.")


def _verify(files: Mapping[str, Path], place: HubPath, url: str, token: str) -> None:
    """Compare the files of a commit with those that were sent: all hashes, and the headers of the tensors."""
    try:
        with hub_errors(place.repo_id, token):
            published = published_files(place.repo_id, str(place.revision), token)
            snapshot = Snapshot(place, str(place.revision), published, token, reached=True)
            wrong = [name for name, path in files.items() if not _arrived(snapshot, name, path)]
    except HubError as error:
        raise type(error)(f"{url} is published, but could not be read back: {error}") from error
    if wrong:
        raise HubError(f"{place.repo_id} does not have what was sent as {', '.join(wrong)}; publish it again.")


def _arrived(snapshot: Snapshot, name: str, path: Path) -> bool:
    if not fits(path, snapshot.files.get(name, HubFile(0, "")).hash):
        return False
    if path.suffix != ".safetensors":
        return True
    header, _ = read_header(path)
    end = min((info.start for info in header.infos.values()), default=header.size)
    with path.open("rb") as file:
        return snapshot.read(name, 0, end) == file.read(end)


def _plan(files: Mapping[str, Path], repo_id: str, revision: str | None, token: str | None) -> str:
    """Report of a dry run."""
    sizes = {name: f"{path.stat().st_size:,} bytes" for name, path in files.items()}
    width = max(map(len, sizes))
    state, card = _state(repo_id, revision, token), files[CARD].read_text(encoding="utf-8")
    return "\n".join(
        [
            f"Would publish {len(files)} files to {repo_id}, {revision or 'main'} ({state}):",
            *(f"  {name:<{width}}  {size}" for name, size in sizes.items()),
            "",
            f"{CARD}:",
            card,
        ]
    )


def _state(repo_id: str, revision: str | None, token: str | None) -> str:
    from huggingface_hub import errors

    try:
        with hub_errors(repo_id, token):
            try:
                found = head(repo_id, revision, token)
            except errors.GatedRepoError:
                raise
            except errors.RepositoryNotFoundError:
                return "a new repository"
            except errors.RevisionNotFoundError:
                return "a new branch"
    except HubConnectionError:
        return "the Hub cannot be reached"
    return f"{'private' if found.private else 'public'}, now at {str(found.sha)[:8]}"


def _settings_of(name: str) -> str:
    """The configuration that belongs to a tensor file of PEFT; empty for any other file."""
    folder, _, own = name.rpartition("/")
    return f"{folder}/{CONFIG}".removeprefix("/") if own == "adapter_model.safetensors" else ""


def files_in(folder: Path) -> dict[str, Path]:
    """The files of a folder that are not hidden, by their names in the repository.

    Raises:
        FileFormatError: One has a name that not every system allows, or is a link to anything but another one.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if _is_hidden(name):
            continue
        if path.is_symlink() and not (path.is_file() and _is_among(path.resolve(), folder.resolve())):
            raise FileFormatError(
                f"{path} is a link to no file in the folder; put the file itself there, or remove it."
            )
        if path.is_file():
            if not is_inside(name.as_posix()):
                raise FileFormatError(f"{str(path)!r} has a name that not every system allows; give it another.")
            files[name.as_posix()] = path
    return files


def _is_among(path: Path, folder: Path) -> bool:
    return path.is_relative_to(folder) and not _is_hidden(path.relative_to(folder))


def _is_hidden(name: Path) -> bool:
    return any(part.startswith(".") for part in name.parts)


def _publishable(folder: Path) -> dict[str, Path]:
    """The files of `folder` by their names in the repository, checked."""
    if not folder.is_dir():
        raise SourceNotFoundError(f"{folder} is not a folder; save the adapter into one first.")
    files = files_in(folder)
    tensors = [path for path in files.values() if path.suffix == ".safetensors"]
    missing = [what for what, there in {CARD: CARD in files, "a safetensors file": tensors}.items() if not there]
    missing += [name for name in map(_settings_of, files) if name and name not in files]
    if missing:
        raise SourceNotFoundError(f"{folder} lacks {', '.join(missing)}; save the adapter into it first.")
    for path in files.values():
        if path.suffix.lower() in _PICKLES:
            raise FileFormatError(f"{path} is a pickle, which can run code where it is read; save it as safetensors.")
        if not path.stat().st_size:
            raise FileFormatError(f"{path} is empty; save it again or remove it.")
    for path in tensors:
        read_header(path)
    check_card(files[CARD])
    return files
