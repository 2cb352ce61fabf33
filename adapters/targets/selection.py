"""`select`, the targets that rules select in a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from adapters.errors import TargetError
from adapters.layers.kinds import UNSUPPORTED
from adapters.methods.core.method import Method
from adapters.targets.pattern import Pattern, Patterns, as_list
from adapters.targets.rule import Rule, why_unused
from adapters.targets.target import Target, all_targets

Group = tuple[list[Target], Method]
"""A target, those that are tied to it, and the method for them."""


@dataclass(frozen=True)
class Selection:
    """Targets of a model with their methods, in the order of the model. It prints as a table."""

    groups: Sequence[Group]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    @property
    def targets(self) -> list[Target]:
        """All targets, the tied ones among them."""
        return [target for group, _ in self.groups for target in group]

    def __str__(self) -> str:
        rows = [("path", "layer", "method")]
        for (first, *tied), method in self.groups:
            rows.append((first.path, type(first.module).__name__, str(method)))
            rows += [(target.path, type(target.module).__name__, f"tied to {first.path}") for target in tied]
        path, layer = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"  {row[0]:<{path}}  {row[1]:<{layer}}  {row[2]}" for row in rows]
        return "\n".join([f"Selection of {len(rows) - 1} targets", *lines])


def select(model: nn.Module, rules: Mapping[Pattern | None, Method], exclude: Patterns | None) -> Selection:
    """Select targets, each with the method of the first rule that matches and can adapt it.

    Targets that are tied, for the method, come together, whichever of them was selected.

    Args:
        model: The model whose targets are looked at.
        rules: Patterns and their methods. The pattern None matches what the method adapts by default.
        exclude: Patterns of targets to leave out.

    Raises:
        TargetError: A pattern matches nothing, or a name selects a target that the method cannot adapt.
    """
    targets = all_targets(model)
    if not targets:
        raise TargetError(
            f"This {type(model).__name__} has no layers below it: put it inside another module, so that an adapter can"
            " take its place."
        )
    included = [Rule(pattern, method, model) for pattern, method in rules.items()]
    excluded = [Rule(pattern, None, model) for pattern in as_list(exclude)]
    selected: dict[Target, Method] = {}
    rest: list[Target] = []
    for target in targets:
        matching = [rule for rule in included if rule.matches(target, rule.method)]
        able = [rule for rule in matching if rule.can_adapt(target)]
        method = (able or matching)[0].method if matching else None
        if excluded and _is_excluded(target, method, excluded):
            continue
        rest.append(target)
        if able and method is not None:
            selected[target] = method
            for rule in able:
                rule.used |= rule.method == method
        elif matching:
            _require_adaptable(target, matching[0])
    for rule in (*included, *excluded):
        if not rule.used:
            raise TargetError(why_unused(rule, targets, selected))
    return Selection(_with_tied(selected, rest))


def _is_excluded(target: Target, method: Method | None, excluded: Sequence[Rule]) -> bool:
    """Whether rules exclude a target that is selected for a method, or for none."""
    matching = [rule for rule in excluded if rule.matches(target, method)]
    for rule in matching:
        rule.used = True
    return bool(matching)


def _require_adaptable(target: Target, rule: Rule) -> None:
    """Raise a TargetError where a rule names a target, or a block with it, that its method cannot adapt."""
    method = rule.method
    if method is None or not rule.is_name:
        return
    if _is_unsupported(target) if method.includes_descendants() else rule.matches_path(target):
        inside = f", or choose what is in it by '{target.path}.**'" if target.module._modules else ""
        raise TargetError(
            f"{target.path} is a {type(target.module).__name__}, which {type(method).__name__} cannot adapt: exclude it"
            f" or choose another method{inside}."
        )


def _is_unsupported(target: Target) -> bool:
    """Whether a parameter is one that no method can adapt."""
    return target.raw_parameter is not None and isinstance(target.module, UNSUPPORTED)


def _with_tied(selected: Mapping[Target, Method], rest: Sequence[Target]) -> list[Group]:
    """Selected targets with those of the rest that are tied to them, each once, with the method of the first."""
    candidates: dict[int, list[Target]] = {}
    for target in rest:
        candidates.setdefault(id(target.raw_parameter), []).append(target)
    taken: set[Target] = set()
    groups: list[Group] = []
    for target, method in selected.items():
        if target in taken:
            continue
        parameter = target.raw_parameter
        group = [target] if parameter is None else candidates[id(parameter)]
        if len(group) > 1:
            key = target.tie_key(method)
            group = [other for other in group if other not in taken and other.tie_key(method) == key]
        taken.update(group)
        groups.append((group, method))
    return groups
