"""Patterns of targets: names, globs, regular expressions, types and functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from adapters.errors import TargetError

Pattern = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern]
Match = Callable[[str, nn.Module], bool]
"""A test of the path of a module and the module."""


def matcher(pattern: Pattern) -> Match:
    """The test that a pattern stands for.

    Raises:
        TargetError: It is no pattern.
    """
    if isinstance(pattern, str):
        if "*" not in pattern:
            name, suffix = pattern, f".{pattern}"
            return lambda path, module: path == name or path.endswith(suffix)
        pattern = glob(pattern)
    if isinstance(pattern, re.Pattern):
        full = pattern.fullmatch
        return lambda path, module: full(path) is not None
    if isinstance(pattern, type):
        kind = pattern
        return lambda path, module: isinstance(module, kind)
    if callable(pattern) and not isinstance(pattern, nn.Module):
        return pattern
    shown = f"A {type(pattern).__name__}" if isinstance(pattern, nn.Module) else repr(pattern)
    raise TargetError(f"{shown} is no pattern: use a name, a glob, a compiled regex, a type or f(path, module).")


def glob(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob.

    `*` stands for anything within one name, `**` for anything; `**.` also for nothing, where a name begins.

    The text that a wildcard stands for is never tried again once the text after it is found: the first place for that
    leaves most to the others. So the time is at most the square of a path's length, whatever the pattern.
    """
    first, *rest = re.split(r"((?:^|(?<=\.))\*{2,}\.|\*{2,})", pattern)
    regex = _within_names(first, last=not rest)
    for wildcard, text in zip(rest[::2], rest[1::2], strict=True):
        if text is rest[-1]:
            regex += (r"(?:.*\.)?" if wildcard.endswith(".") else ".*") + _within_names(text, last=True)
        else:
            any_ = r"(?:.*?\.)??" if wildcard.endswith(".") else ".*?"
            regex += f"(?>{any_}{_within_names(text, last=False)})"
    return re.compile(regex)


def _within_names(text: str, last: bool) -> str:
    """The expression for a part of a glob without `**`, the last part or one before it."""
    first, *rest = map(re.escape, text.split("*"))
    found = [rf"(?>[^.]*?{part})" for part in rest]
    if last and rest:
        found[-1] = rf"[^.]*{rest[-1]}"
    return first + "".join(found)


def as_rules(method: Any, targets: Patterns | None) -> dict[Pattern | None, Any]:
    """A method and its targets, or a mapping of patterns to methods, as a mapping. The pattern None is the default one.

    Raises:
        TargetError: There are no patterns, or they are given twice.
    """
    if isinstance(method, Mapping):
        if targets is not None:
            raise TargetError("Targets are given twice: in the mapping of patterns to methods and as targets=.")
        if not method:
            raise TargetError("There are no patterns in the mapping of patterns to methods: name some.")
        return dict(method)
    if targets is None:
        return {None: method}
    patterns = as_list(targets)
    if not patterns:
        raise TargetError("There are no targets in the list: name some, or leave targets= out for every layer.")
    return dict.fromkeys(patterns, method)


def as_list(patterns: Patterns | None) -> list[Pattern]:
    """One pattern or several as a list."""
    if patterns is None:
        return []
    if isinstance(patterns, Mapping):
        raise TargetError("A mapping of patterns to methods takes the place of the method, not of the patterns.")
    if isinstance(patterns, Iterable) and not isinstance(patterns, (str, type, nn.Module)):
        return list(patterns)
    return [patterns]
