"""Regular expressions in PEFT's settings: values by pattern, and a bound on the time that matching takes."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

# Matching may try so many ways in all, a minute's worth. Patterns with a few `.*` are far below it.
_MOST_WAYS = 10**9
_TOKEN = re.compile(
    r"""
    \\. | \[\^?\]?(?:\\.|[^\]\\])*\]  # One character: escaped, or of a set.
    | \((?:\?(?:P<\w+>|<?[=!]|:|>)|(?!\?))  # Not what changes the meaning of the rest: flags, conditions, comments.
    | (?P<repeat>(?:[*+?]|\{(?=[\d,])\d*,?\d*\})[?+]?)
    | [^(]
    """,
    re.VERBOSE | re.DOTALL,
)


class PatternTable:
    """Values by pattern, as PEFT looks them up: a pattern matches the end of a path, from a dot on."""

    def __init__(self, table: Mapping[str, Any]) -> None:
        """Raises a ValueError for a pattern that is no regular expression."""
        self._table = table
        self._compiled = [(compiled(rf"(.*\.)?({pattern})$"), value) for pattern, value in table.items()]

    @property
    def patterns(self) -> Collection[str]:
        return self._table.keys()

    def found(self, layer: str) -> list[Any]:
        """The values of all patterns that match; PEFT takes the first."""
        return [value for pattern, value in self._compiled if pattern.match(layer)]

    def get(self, layer: str, default: Any) -> Any:
        """The value for a layer."""
        matching = (value for pattern, value in self._compiled if pattern.match(layer))
        return next(matching, self._table.get(layer, default))


def compiled(pattern: str) -> re.Pattern[str]:
    """The pattern; raises a ValueError where it is none."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:50]!r} is no regular expression: {error}") from None


def are_quick(patterns: Iterable[str], layers: Collection[str]) -> bool:
    """Whether each of some patterns can be tried on each of some layers in a time worth waiting for."""
    longest = max(map(len, layers), default=0)
    return len(layers) * sum(_ways(pattern, longest) for pattern in patterns) <= _MOST_WAYS


def _ways(pattern: str, length: int) -> int:
    """Upper bound on the ways to match a pattern from one place in a string: backtracking may try them all."""
    # Of each group that is open: the ways of its alternatives so far, of the present one, and of the last item in it.
    groups = [[0, 1, 1]]
    at = 0
    while at < len(pattern):
        token = _TOKEN.match(pattern, at)
        if token is None:
            return _MOST_WAYS + 1
        at = token.end()
        group = groups[-1]
        if token[0] == ")":
            group = groups.pop()
            groups[-1][2] = _closed(group)
        elif token[0] == "|":
            group[:] = _closed(group), 1, 1
        elif token["repeat"]:
            group[2] = _repeated(group[2], token[0], length)
        else:
            group[1:] = _limited(group[1] * group[2]), 1
            if token[0][0] == "(":
                groups.append([0, 1, 1])
    return _closed(groups[0])


def _closed(group: list[int]) -> int:
    return _limited(group[0] + group[1] * group[2])


def _repeated(ways: int, quantifier: str, length: int) -> int:
    """The number of ways for repetitions of a part, from the number for the part."""
    if quantifier[0] == "?":
        return 1 + ways
    most = max(length, *map(int, re.findall(r"\d+", quantifier)), 0)
    return _limited(1 + most if ways == 1 else _MOST_WAYS + 1)


def _limited(ways: int) -> int:
    """A number of ways, counted no further than to one too many."""
    return min(ways, _MOST_WAYS + 1)
