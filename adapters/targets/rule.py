"""`Rule`, a pattern of a selection, and why it selects nothing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence

from torch import nn

from adapters.methods.core.method import Method
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.targets.pattern import Match, Pattern, matcher
from adapters.targets.target import Target

# Characters that a regular expression may have, and neither a path nor a glob has.
_REGEX = re.compile(r"[\\()|\[\]+?^$]|\.\*[^.]|^\.")

# Names that models give to the layer that makes the final scores.
_HEAD_NAMES = frozenset({"lm_head", "classifier", "score", "head", "output_head"})


class Rule:
    """A pattern, and the method for what it matches; without a method, a pattern of what is excluded.

    Attributes:
        pattern: The pattern; None for the default targets of the method.
        method: The method, or None.
        used: Whether it has selected, or excluded, any target.
    """

    def __init__(self, pattern: Pattern | None, method: Method | None, model: nn.Module) -> None:
        self.pattern = pattern
        self.method = method
        self.used = False
        self.is_name = isinstance(pattern, str) and "*" not in pattern
        # A parameter that is no `weight` is a target when it is named, not when a wildcard happens to match it.
        last_is_name = isinstance(pattern, str) and "*" not in pattern.rpartition(".")[2]
        self._names_parameters = last_is_name or isinstance(pattern, re.Pattern)
        self._model = model
        self._match = _default_match(method, model) if pattern is None else matcher(pattern)

    def matches(self, target: Target, method: Method | None) -> bool:
        """Whether the pattern selects a target for a method, by itself or by a module that holds it."""
        return any(self._match(path, module) for path, module in self._candidates(target, method))

    def can_adapt(self, target: Target) -> bool:
        """Whether the method can adapt a target."""
        return self.method is not None and self.method.matrix(target.module, target.parameter) is not None

    def matches_path(self, target: Target) -> bool:
        """Whether the pattern matches the path of a target itself, rather than of a module that holds it."""
        return any(self._match(path, target.module) for path in target.paths)

    def _candidates(self, target: Target, method: Method | None) -> list[tuple[str, nn.Module]]:
        """The paths and modules by which a target may be selected for a method."""
        itself = self._itself(target, method)
        if method is None:
            return itself
        if not method.selects(target.parameter):
            return [] if target.is_weight else itself
        ancestors = method.includes_descendants()
        if ancestors or not target.is_weight:
            return [*itself, *target.enclosing_modules(self._model, ancestors)]
        return itself

    def _itself(self, target: Target, method: Method | None) -> list[tuple[str, nn.Module]]:
        """The paths and modules by which a target may be selected as such."""
        if not (target.is_weight or target.attentions or self._names_parameters):
            return []
        if method is None:
            return target.named_modules
        # An nn.MultiheadAttention is a target as a whole for methods beside it, and by its projections for the others.
        if not method.mergeable:
            return [candidate for candidate in target.named_modules if candidate not in target.attentions]
        is_attention = target.is_weight and isinstance(target.module, nn.MultiheadAttention)
        return [] if is_attention else target.named_modules


def _default_match(method: Method | None, model: nn.Module) -> Match:
    """The default targets of a method: by its own rule, or every layer but the output head."""
    if method is not None and (default := method.default_targets(model)) is not None:
        return default
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None  # As transformers models have it.
    head = head.base if isinstance(head, AdaptedLayer) else head
    return lambda path, module: module is not head and path.rpartition(".")[2] not in _HEAD_NAMES


def why_unused(rule: Rule, targets: Sequence[Target], selected: Collection[Target]) -> str:
    """The sentence that says why a rule selects nothing, of all targets and those that are selected by others."""
    method = type(rule.method).__name__
    if rule.pattern is None:
        return (
            f"The model has no layer that {method} supports besides its output head: choose another method, or name the"
            " targets."
        )
    matched = [target for target in targets if rule.matches(target, rule.method)]
    if any(target in selected and rule.can_adapt(target) for target in matched):
        return f"The pattern {rule.pattern!r} is left without a layer by those before it: put it in front of them."
    if matched:
        return (
            f"The pattern {rule.pattern!r} selects no layer to adapt, only excluded or unsupported ones such as"
            f" {_shown(matched[0])}."
        )
    others = [target for target in targets if rule.matches(target, None)]
    if others and rule.method is not None:
        return (
            f"The pattern {rule.pattern!r} selects only layers that have no parameter for {method}, such as"
            f" {_shown(others[0])}."
        )
    return f"The pattern {rule.pattern!r} matches no layer; {_hint(rule.pattern, [target.path for target in targets])}."


def _shown(target: Target) -> str:
    return f"{target.path} ({type(target.module).__name__})"


def _hint(pattern: Pattern, paths: list[str]) -> str:
    """The way to mend a pattern that matches none of the paths."""
    if not isinstance(pattern, str):
        return f"the paths are such as {', '.join(map(repr, paths[-3:]))}"
    if pattern == "all-linear":  # As PEFT calls it.
        return "for every linear layer but the output head, leave targets= out or pass targets=torch.nn.Linear"
    if _REGEX.search(pattern):
        return f"if it is a regular expression, pass re.compile({pattern!r})"
    names = sorted({*paths, *(path.rpartition(".")[2] for path in paths)})
    near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.5) or names[-3:]
    return f"near it are {', '.join(map(repr, near))}"
