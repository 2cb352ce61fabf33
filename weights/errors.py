"""Errors of files and of the Hub. Every message names the offending thing and the fix."""

from collections.abc import Sequence

_MOST_SHOWN = 5


class WeightsError(Exception):
    """Base of every error that this package raises by itself.

    Example:
        >>> try:
        ...     weights.read_adapter("style.safetensors")
        ... except weights.WeightsError as error:
        ...     print(error)
        style.safetensors: no such file or folder; check the path, ...
    """


class SourceNotFoundError(WeightsError, FileNotFoundError):
    """A file or a folder that does not exist, or a folder without a file of tensors.

    Example:
        >>> try:
        ...     weights.open("model.safetensors")
        ... except weights.SourceNotFoundError as error:
        ...     print(error)
        model.safetensors: no such file or folder; check the path, ...
    """


class FileFormatError(WeightsError, ValueError):
    """A file, or what should become one, of the wrong kind, corrupt, hostile or not supported.

    Example:
        >>> layer = weights.LayerWeights("vera", {"rank": 4}, {})
        >>> try:
        ...     weights.write_adapter(weights.AdapterFile({"fc": layer}), "style", format="mlx")
        ... except weights.FileFormatError as error:
        ...     print(error)
        style does not work as a mlx-lm file: layer 'fc' has the method 'vera', ...
    """


class FileWriteError(WeightsError, OSError):
    """A file that cannot be written; the old one is kept.

    Example:
        >>> path = weights.save({"weight": torch.zeros(2)}, "model.safetensors")
        >>> try:
        ...     weights.save({"weight": torch.ones(2)}, path / "inside.safetensors")
        ... except weights.FileWriteError as error:
        ...     print(error)
        model.safetensors/inside.safetensors cannot be written: ...
    """


class HubError(WeightsError, OSError):
    """A request that the Hub refused, that failed, or that was answered with something else.

    Example:
        >>> try:
        ...     weights.download("style lora")
        ... except weights.HubError as error:
        ...     print(error)
        'style lora' is not a repository id; write it as user/repo.
    """


class HubAccessError(HubError):
    """No token, or one without the permission; also a repository that does not exist, or is private or gated.

    Example:
        >>> try:
        ...     weights.download("someone/secret-lora")
        ... except weights.HubAccessError as error:
        ...     print(error)
        someone/secret-lora is neither a local path nor a repository this token can see; ...
    """


class HubConflictError(HubError):
    """A commit of somebody else between looking at a repository and committing to it. Nothing is published then.

    Example:
        >>> for attempt in range(3):
        ...     try:
        ...         url = weights.publish("out", "me/style-lora")
        ...         break
        ...     except weights.HubConflictError:
        ...         continue
    """


class HubConnectionError(HubError):
    """A Hub that cannot be reached, where the cache has not what is needed.

    Example:
        >>> try:
        ...     style = weights.read_adapter("someone/style-lora")
        ... except weights.HubConnectionError:
        ...     style = weights.read_adapter("out")
    """


def listed(problems: Sequence[str]) -> str:
    """Problems in one sentence: the first five, and the number of the others."""
    more = len(problems) - _MOST_SHOWN
    return "; ".join([*problems[:_MOST_SHOWN], *([f"and {more} more"] if more > 0 else [])])
