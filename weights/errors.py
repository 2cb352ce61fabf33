"""Errors of files and of the Hub. Every message names the offending thing and the fix."""

from collections.abc import Sequence

_MOST_SHOWN = 5


class WeightsError(Exception):
    """Base of every error this package raises on purpose."""


class SourceNotFoundError(WeightsError, FileNotFoundError):
    """There is no such file, folder or tensor file inside the folder."""


class FileFormatError(WeightsError, ValueError):
    """A file, or what should become one, is of the wrong kind, corrupt, hostile or not supported."""


class FileWriteError(WeightsError, OSError):
    """A file cannot be written; what was there before is kept."""


class HubError(WeightsError, OSError):
    """The Hub refused, failed, or sent something wrong."""


class HubAccessError(HubError):
    """No token, or one that may not do this; also a repository that does not exist or is private or gated."""


class HubConflictError(HubError):
    """Somebody else changed the repository in between."""


class HubConnectionError(HubError):
    """The Hub cannot be reached."""


def listed(problems: Sequence[str]) -> str:
    """Problems in one sentence: the first five, and the number of the others."""
    more = len(problems) - _MOST_SHOWN
    return "; ".join([*problems[:_MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])])
