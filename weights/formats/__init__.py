"""The formats of adapter files: one module each, found by discovery.

A module states a `FORMAT`, which goes by the module's name. Each says of a file, knowing no other format, whether it is
SURE of it, can read it as a FALLBACK, or NO. The surest wins: a format that is SURE, and only where none is, one that
takes the file as a FALLBACK. But nothing is dropped in silence: a FALLBACK that reads more files than the one that is
SURE, such as settings beside the tensors, counts as well. Two that count are an error that names both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from weights.discovery import stated
from weights.errors import FileFormatError
from weights.formats.common.format import Format, Match
from weights.formats.common.probe import Probe

__all__ = ["Format", "Match", "Probe", "canonical", "formats", "recognised", "writable"]


@cache
def formats() -> Mapping[str, Format]:
    """Every format by its name: those that are written, the one that holds most methods first, then the others."""
    found = {name: format for name, some in stated("weights.formats", "FORMAT", Format).items() for format in some}
    return dict(sorted(found.items(), key=lambda item: _order(*item)))


def _order(name: str, format: Format) -> tuple[bool, bool, int, str]:
    return format.write is None, format.methods is not None, -len(format.methods or ()), name


def writable() -> tuple[str, ...]:
    """The names of the formats that are written too."""
    return tuple(name for name, format in formats().items() if format.write is not None)


def canonical(name: str) -> str:
    """The name of a format that is written, by its name or an alias.

    Example:
        >>> canonical("kohya")
        'lycoris'

    Raises:
        FileFormatError: There is none.
    """
    for own in writable():
        if name in (own, *formats()[own].aliases):
            return own
    raise FileFormatError(f"{name!r} is no format that is written; choose from {', '.join(writable())}.")


def recognised(probe: Probe) -> list[str]:
    """The names of the formats that a file may be of, by the rule of this package: one, if that is clear."""
    matches = {name: format.recognise(probe) for name, format in formats().items()}
    sure = [formats()[name] for name, match in matches.items() if match is Match.SURE]
    return [
        name
        for name, match in matches.items()
        if match is Match.SURE
        or (match is Match.FALLBACK and not any(_reads_as_much(one, formats()[name], probe) for one in sure))
    ]


def _reads_as_much(format: Format, other: Format, probe: Probe) -> bool:
    """Whether a format reads every file that another one would read here."""
    beside = {name for name in other.files if probe.file is None or name != probe.file.name}
    there = {name for name in beside if (probe.folder / name).is_file()}
    return format.suffix == other.suffix and there <= {*format.files}
