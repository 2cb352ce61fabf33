"""Selection of targets by rules."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

from torch import nn

from adapters.errors import TargetError
from adapters.layers.kinds import UNSUPPORTED
from adapters.methods.core.method import Method
from adapters.targets.pattern import Pattern, Patterns, _as_list, _Selector
from adapters.targets.target import Target, all_targets


def select(
    model: nn.Module, rules: Mapping[Pattern | None, Method], exclude: Patterns | None
) -> list[tuple[list[Target], Method]]:
    """The layers that rules select, each with the method of the first rule that matches and can adapt it.

    Layers that use one parameter in a way that is the same to the method come together, whichever of them was
    selected.

    Args:
        model: The model whose layers are looked at.
        rules: Patterns and their methods. The pattern None matches what the method adapts by default.
        exclude: Patterns of layers to leave out.

    Raises:
        TargetError: A pattern matches nothing, or a name selects a layer that the method cannot adapt.
    """
    everything = all_targets(model)
    if not everything:
        raise TargetError(
            f"This {type(model).__name__} has no layers below it: put it inside another module, so that an adapter can"
            " take its place."
        )
    selectors = [_Selector(pattern, method, model) for pattern, method in rules.items()]
    excluded = [_Selector(pattern, None, model) for pattern in _as_list(exclude)]
    chosen: list[tuple[Target, Method]] = []
    rest: list[Target] = []
    for layer in everything:
        matching = [selector for selector in selectors if selector.matches(layer, selector.method)]
        able = [selector for selector in matching if selector.can_adapt(layer)]
        first = (able or matching)[0].method if matching else None
        if not matching and not excluded:
            rest.append(layer)
            continue
        left_out = [selector for selector in excluded if selector.matches(layer, first)]
        for selector in left_out:
            selector.useful = True
        if not left_out:
            rest.append(layer)
        if left_out or not matching:
            continue
        method = cast("Method", first)
        if able:
            chosen.append((layer, method))
            for selector in able:
                selector.useful |= selector.method == method
        elif matching[0].is_name and (_is_left(layer) if method.includes_descendants() else matching[0].names(layer)):
            raise TargetError(
                f"{layer.path} is a {type(layer.module).__name__}, which {type(method).__name__} cannot adapt:"
                f" exclude it or choose another method{_inside(layer)}."
            )
    for selector in (*selectors, *excluded):
        if not selector.useful:
            raise TargetError(selector.complaint(everything, {id(layer) for layer, _ in chosen}))
    return _with_tied(chosen, rest)


def _inside(layer: Target) -> str:
    """How to choose what is in a block rather than the block."""
    return f", or choose what is in it by '{layer.path}.**'" if layer.module._modules else ""


def _is_left(layer: Target) -> bool:
    """Whether there is a parameter that no method can adapt, though it is one of what was named."""
    return layer.own is not None and isinstance(layer.module, UNSUPPORTED)


def _with_tied(chosen: list[tuple[Target, Method]], rest: list[Target]) -> list[tuple[list[Target], Method]]:
    """Layers together with those of the rest that are tied to them, each once, with the method of the first of them."""
    candidates: dict[int, list[Target]] = {}
    for layer in rest:
        candidates.setdefault(id(layer.own), []).append(layer)
    taken: set[int] = set()
    groups: list[tuple[list[Target], Method]] = []
    for layer, method in chosen:
        if id(layer) in taken:
            continue
        own = layer.own
        group = [layer] if own is None else candidates[id(own)]
        if len(group) > 1:
            use = layer.use(method)
            group = [other for other in group if id(other) not in taken and other.use(method) == use]
        taken.update(map(id, group))
        groups.append((group, method))
    return groups
