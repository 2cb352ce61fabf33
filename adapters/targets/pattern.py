"""Patterns of targets: names, globs, regular expressions, types and functions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from adapters.errors import TargetError
from adapters.methods.core.method import Method
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.targets.target import Target

Pattern = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern]

# What a regular expression may have in it, and neither a path nor a glob has.
_REGEX = re.compile(r"[\\()|\[\]+?^$]|\.\*[^.]|^\.")

# Names that models give to the layer that makes the final scores.
_HEAD_NAMES = frozenset({"lm_head", "classifier", "score", "head", "output_head"})


class _Selector:
    """One pattern, what it is for, and whether it was of any use."""

    def __init__(self, pattern: Pattern | None, method: Method | None, model: nn.Module) -> None:
        self.pattern = pattern
        self.method = method
        self.model = model
        self.useful = False
        self.is_name = isinstance(pattern, str) and "*" not in pattern
        # A parameter that is no layer's weight is a target when it is named, not when it happens to be there.
        named = isinstance(pattern, str) and "*" not in pattern.rpartition(".")[2]
        self._reaches_parameters = named or isinstance(pattern, re.Pattern)
        self._matches = _matcher(pattern, model, method)

    def matches(self, layer: Target, method: Method | None) -> bool:
        """Whether it matches a layer, or what makes a method choose it."""
        bare = layer.parameter != "weight"
        if bare and not (layer.owners or self._reaches_parameters or (method and method.chooses(layer.parameter))):
            return False
        names = [] if bare and not layer.owners and not self._reaches_parameters else layer.names
        # Torch's attention is a target by its parts, or as a whole for what changes no weights.
        if method is not None and method.mergeable and isinstance(layer.module, nn.MultiheadAttention) and not bare:
            names = []
        if method is not None and not method.mergeable:
            names = [name for name in names if name not in layer.owners]
        if method is not None and not method.chooses(layer.parameter):
            names = names if bare else []
        elif method is not None and (bare or method.includes_descendants()):
            names = [*names, *layer.holders(self.model, method.includes_descendants())]
        return any(self._matches(path, module) for path, module in names)

    def can_adapt(self, layer: Target) -> bool:
        """Whether its method can adapt a layer."""
        return self.method is not None and self.method.matrix(layer.module, layer.parameter) is not None

    def names(self, layer: Target) -> bool:
        """Whether it matches the path of a layer itself, rather than of a module that has it."""
        return any(self._matches(path, layer.module) for path in layer.paths)

    def complaint(self, everything: list[Target], taken: set[int]) -> str:
        """Why it is of no use, given the layers and the ids of those that were chosen."""
        if self.pattern is None:
            return (
                f"The model has no layer that {type(self.method).__name__} supports besides its output head: choose"
                " another method, or name the targets."
            )
        matched = [layer for layer in everything if self.matches(layer, self.method)]
        if any(id(layer) in taken and self.can_adapt(layer) for layer in matched):
            return f"The pattern {self.pattern!r} is left without a layer by those before it: put it in front of them."
        if matched:
            return (
                f"The pattern {self.pattern!r} selects no layer to adapt, only excluded or unsupported ones such as"
                f" {matched[0].path} ({type(matched[0].module).__name__})."
            )
        others = [layer for layer in everything if self.matches(layer, None)]
        if others and self.method is not None:
            return (
                f"The pattern {self.pattern!r} selects only layers that have no parameter for"
                f" {type(self.method).__name__}, such as {others[0].path} ({type(others[0].module).__name__})."
            )
        return f"The pattern {self.pattern!r} matches no layer; {self._hint([layer.path for layer in everything])}."

    def _hint(self, paths: list[str]) -> str:
        if not isinstance(self.pattern, str):
            return f"the paths are such as {', '.join(map(repr, paths[-3:]))}"
        if _REGEX.search(self.pattern):
            return f"if it is a regular expression, pass re.compile({self.pattern!r})"
        names = sorted({*paths, *(path.rpartition(".")[2] for path in paths)})
        near = difflib.get_close_matches(self.pattern, names, n=3, cutoff=0.5) or names[-3:]
        return f"near it are {', '.join(map(repr, near))}"


def _matcher(pattern: Pattern | None, model: nn.Module, method: Method | None) -> Callable[[str, nn.Module], bool]:
    if pattern is None:
        if method is not None and (default := method.default(model)) is not None:
            return default
        head = _output_head(model)
        return lambda path, module: module is not head and path.rpartition(".")[2] not in _HEAD_NAMES
    if isinstance(pattern, str):
        if "*" in pattern:
            pattern = _glob(pattern)
        else:
            name, suffix = pattern, f".{pattern}"
            return lambda path, module: path == name or path.endswith(suffix)
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


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` stands for anything within one name, `**` for anything; `**.` also for nothing, where a name begins.

    What a wildcard stands for is never tried again once the text after it is found: the first place for that leaves
    most to the others. So the time is at most the square of a path's length, whatever the pattern.
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


def _output_head(model: nn.Module) -> object:
    """The layer that a transformers model calls its output embeddings, where there is one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head.base if isinstance(head, AdaptedLayer) else head


def as_rules(method: Any, targets: Patterns | None) -> dict[Pattern | None, Any]:
    """A method and its targets, or a mapping of patterns to methods, as one mapping."""
    if isinstance(method, Mapping):
        if targets is not None:
            raise TargetError("Targets are given twice: in the mapping of patterns to methods and as targets=.")
        if not method:
            raise TargetError("There are no patterns in the mapping of patterns to methods: name some.")
        return dict(method)
    if targets is None:
        return {None: method}
    patterns = _as_list(targets)
    if not patterns:
        raise TargetError("There are no targets in the list: name some, or leave targets= out for every layer.")
    return dict.fromkeys(patterns, method)


def _as_list(patterns: Patterns | None) -> list[Pattern]:
    if patterns is None:
        return []
    if isinstance(patterns, Mapping):
        raise TargetError("A mapping of patterns to methods takes the place of the method, not of the patterns.")
    if isinstance(patterns, Iterable) and not isinstance(patterns, (str, type, nn.Module)):
        return list(patterns)
    return [patterns]
