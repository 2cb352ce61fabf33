"""Errors of the Hub's client, of many unrelated types, as one kind of error that names the fix."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from weights.errors import FileWriteError, HubAccessError, HubConflictError, HubConnectionError, HubError, WeightsError

# huggingface_hub is imported inside the functions: it takes 0.3 s, and most work is on local files.


@contextmanager
def hub_errors(repo_id: str, token: str | None = None) -> Iterator[None]:
    """Block that turns errors of the client into a HubError about a repository, or a FileWriteError.

    A token that no request could carry is refused first: the error that it would lead to shows it.
    """
    if token is not None and not (token.isascii() and token.isprintable() and " " not in token and token):
        raise HubAccessError("The token has characters that no token has; copy it again from the Hub's settings.")
    try:
        yield
    except WeightsError:
        raise
    except Exception as error:
        told = _translated(error, repo_id, token)
        # A traceback shows what caused it too, and a server may repeat what it was sent.
        raise told from (None if token and _shows(error, token) else error)


def _shows(error: BaseException | None, token: str) -> bool:
    """Whether an error or what led to it has the token in its text."""
    while error is not None:
        if token in f"{error} {error!r}":
            return True
        error = error.__cause__ or error.__context__
    return False


def _translated(error: BaseException, repo_id: str, token: str | None) -> WeightsError:
    """The error for `error`, found from what caused it: the client wraps refusals in unrelated errors."""
    cause: BaseException | None = error
    while cause is not None:
        known = _known(cause, repo_id, token)
        if known is not None:
            return known
        cause = cause.__cause__
    return HubError(f"{repo_id}: the Hub's client failed with {type(error).__name__}: {_brief(error, token)}")


def _known(error: BaseException, repo_id: str, token: str | None) -> WeightsError | None:
    import httpx2
    from huggingface_hub import constants, errors

    match error:
        case errors.GatedRepoError():
            return HubAccessError(
                f"{repo_id} is gated; accept its terms at {_site()}/{repo_id}, then run `hf auth login` or pass token=."
            )
        case errors.RepositoryNotFoundError():
            return HubAccessError(
                f"{repo_id} is neither a local path nor a repository this token can see; check the spelling, or run"
                " `hf auth login` if it is private."
            )
        case errors.RevisionNotFoundError():
            return HubError(f"{repo_id} has no such revision; check the branch, tag or commit.")
        case errors.RemoteEntryNotFoundError():
            return HubError(f"{repo_id} lists a file that it does not have; try again, or ask who publishes it.")
        case errors.HFValidationError():
            return HubError(f"{repo_id!r} is not a repository id; write it as user/repo.")
        case errors.OfflineModeIsEnabled():
            return HubConnectionError(f"{repo_id} needs the Hub, and its offline mode is on; unset HF_HUB_OFFLINE.")
        case errors.HfHubHTTPError():
            return _refusal(error.response.status_code, _brief(error.server_message or error, token), repo_id)
        case httpx2.RemoteProtocolError() | httpx2.ReadError() | httpx2.WriteError():
            return HubConnectionError(f"{repo_id}: the connection to the Hub was lost; try again.")
        case httpx2.TransportError():
            return HubConnectionError(
                f"{repo_id} is no local path, and the Hub at {_site()} cannot be reached; check the path,"
                " the network and HF_ENDPOINT."
            )
        case OSError(errno=int()):
            place = error.filename or constants.HF_HUB_CACHE
            return FileWriteError(f"{place} cannot be written: {error.strerror}; choose another cache with HF_HOME.")
        case OSError() if "Consistency check failed" in str(error):
            return HubConnectionError(f"{repo_id}: a file came with another length than published; try again.")
    return None


def _site() -> str:
    """The address of the Hub, without the name and the password that may be in it."""
    from huggingface_hub import constants

    return re.sub(r"//[^/]*@", "//", constants.ENDPOINT)


def _refusal(status: int, message: str, repo_id: str) -> HubError:
    match status:
        case 401 | 403:
            return HubAccessError(
                f"{repo_id}: the token may not do this; run `hf auth login`, set HF_TOKEN or pass token= with one that"
                " may."
            )
        case 412:
            return HubConflictError(f"{repo_id} was changed by somebody else meanwhile; look at it and try again.")
        case 429:
            return HubError(f"{repo_id}: the Hub answered 429, too many requests; wait some minutes and try again.")
    return HubError(f"{repo_id}: the Hub answered {status}: {message}")


def _brief(message: object, token: str | None) -> str:
    """The first line of a message, without the token: a server may repeat what it was sent."""
    line = next(iter(str(message).strip().splitlines()), "it does not say why")[:300]
    return line.replace(token, "<token>") if token else line
