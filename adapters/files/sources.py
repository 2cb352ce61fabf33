"""Several adapters for one call: reading them, and errors that begin with their names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any, NamedTuple

import weights
from adapters.activation.switch import finite
from adapters.errors import AdapterError

Source = str | PathLike[str] | weights.AdapterFile


class Given(NamedTuple):
    """An adapter that was given to a call.

    Attributes:
        name: Where it is from, or its number.
        file: The adapter.
        scale: Its scale, or its weight in a sum.
    """

    name: str
    file: weights.AdapterFile
    scale: float


def read_all(sources: Mapping[Any, float] | Iterable[tuple[Source, float]]) -> list[Given]:
    """Read adapters, each with its scale."""
    given: list[Given] = []
    for number, (source, scale) in enumerate(sources.items() if isinstance(sources, Mapping) else sources, start=1):
        name, file = f"Adapter {number}", source
        if not isinstance(file, weights.AdapterFile):
            name, file = str(source), weights.read_adapter(source)
        given.append(Given(name, file, finite(scale, f"The scale of {name}")))
    return given


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Prefix the errors of this block with the name of an adapter."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(f"{name}: {error}") from error
