"""The fast path of a node: a linear layer and its low-rank branches in a few operations, past the modules.

It halves the time of a call for layers of 64 features, and makes no difference from about 768 on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from adapters.activation.active import active
from adapters.activation.mixed_batch import Rows
from adapters.activation.switch import Switch
from adapters.lowrank.linear import linear, linear_of_rows
from adapters.lowrank.low_rank import LowRank
from adapters.methods.core.method import Branch
from adapters.runtime.watch import Watch, extras_of
from fluxion.calls import GLOBAL_HOOKS, PLAIN_CALLS

_forward, _Parameter = nn.Linear.forward, nn.Parameter
# Two private names of torch. The public `torch.is_autocast_enabled` asks of one type of device, is not defined for
# meta, and takes five times as long: 3 % of a call. Of transforms such as vmap, under which writing in place is slow or
# refused, `torch.autograd.Function` asks by the same name, and there is no public one.
_is_autocast_enabled, _is_transformed = torch._C._is_any_autocast_enabled, torch._C._are_functorch_transforms_active


class FastPath:
    """A node as it was found. What somebody changes, hooks or overrides by hand since is noticed in each call.

    It does not refer to the node, so that a model is freed as soon as nothing else has it.
    """

    def __init__(self, node: nn.Module, layer: nn.Module) -> None:
        self._children = inner, *others = [*node._modules.values()]
        self._layer, self._base, self._parameters = layer, vars(layer), layer._parameters
        self._sizes = len(vars(node)), len(self._base)  # A new table of hooks is one more.
        self._extras, self._base_extras = extras_of(vars(node)), extras_of(self._base)
        self._branches = [child for child in others if isinstance(child, Branch)]
        self._applies = inner is layer and type(layer).__call__ in PLAIN_CALLS
        self._found: dict[Branch, _Found | None] = {}  # Of those that were active: hundreds may never be.
        self._mixed: _Mixed | None = None

    def holds(self, state: dict[str, Any]) -> bool:
        """Whether a node of this `__dict__` and its layer have the same attributes and children, and no hooks."""
        return (
            (len(state), len(self._base)) == self._sizes
            and [*state["_modules"].values()] == self._children
            and not (self._extras and any(map(state.get, self._extras)))
            and not any(map(self._base.get, self._base_extras))
        )

    def run(self, x: Any) -> Tensor | None:
        """The output for an input, or None where the layer or an active branch has to run by itself."""
        weight: Any = self._parameters.get("weight")
        bias: Any = self._parameters.get("bias", self)  # It may be computed, or a buffer.
        if not (
            self._applies
            and type(x) is Tensor
            and type(weight) is _Parameter
            and (dtype := x.dtype) is weight.dtype
            and (bias is None or (type(bias) is _Parameter and bias.dtype is dtype))
            and type(self._layer).forward is _forward
            and x.ndim > 1
            and not any(GLOBAL_HOOKS)
            and not _is_autocast_enabled()
            and not _is_transformed()
        ):
            return None
        chosen = active(self._branches)
        if isinstance(chosen, Rows):
            return self._run_rows(chosen, x, weight, bias)
        updates: list[LowRank] = []
        for branch, scale in chosen:
            if (update := self._update(branch, scale)) is None:
                return None
            updates.append(update.to(dtype))
        if len(updates) == 1 and not (updates[0].dropout and dtype.is_complex):
            return linear(x, weight, bias, updates[0])
        if not updates or any(update.dropout for update in updates):  # Each drops inputs of its own.
            return None
        return linear(x, weight, bias, LowRank.join(updates))

    def _update(self, branch: Branch, scale: float) -> LowRank | None:
        """The update of a branch at a strength; None for a branch that is more than that."""
        found = self._found.get(branch)
        if found is None or found.scale != scale or not found.watch.holds():
            found = self._found[branch] = _find(branch, scale)
        return None if found is None else found.update

    def _run_rows(self, rows: Rows, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The output for a mixed batch, where no gradients are wanted."""
        mixed = self._mixed
        if mixed is None or mixed.rows() is not rows or not mixed.watch.holds():
            mixed = self._mixed = self._mix(rows)
        if mixed is None or len(x) != rows.count:
            return None
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in mixed.factors((x, weight, bias))):
            return None
        joined = [LowRank.join(some).to(x.dtype) if some else None for some in mixed.updates]
        return linear_of_rows(x, weight, bias, rows, joined)

    def _mix(self, rows: Rows) -> _Mixed | None:
        """The updates for these rows; None if an active branch has to run by itself."""
        by_switch: dict[Switch, list[Branch]] = {}
        for branch in self._branches:
            by_switch.setdefault(branch.switch, []).append(branch)
        groups = [
            [(branch, scale) for switch, scale in weights.items() if scale for branch in by_switch.get(switch, ())]
            for weights, _ in rows.groups
        ]
        watch = Watch(part for group in groups for branch, _ in group for part in (branch, *branch._modules.values()))
        updates: list[list[LowRank]] = []
        for group in groups:
            found = [self._update(branch, scale) for branch, scale in group]
            some = [update for update in found if update is not None and not update.dropout]
            if len(some) < len(found):
                return None
            updates.append(some)
        return _Mixed(ref(rows), watch, updates)


@dataclass(slots=True)
class _Found:
    """The update of a branch at a strength, as long as its modules are as they were found."""

    watch: Watch
    scale: float
    update: LowRank


def _find(branch: Branch, scale: float) -> _Found | None:
    if not branch.bypass or branch.method.low_rank(branch) is None:
        return None
    watch = Watch((branch, *branch._modules.values()))
    update = branch.method.low_rank(branch)  # As it is since it is watched: another thread may change it.
    if update is None or not type(update.up) is type(update.down) is _Parameter or not watch.holds():
        return None
    return _Found(watch, scale, update.scaled(scale))


@dataclass(slots=True)
class _Mixed:
    """The updates of each group of a mixed batch, as long as that lives and the modules are as they were found."""

    rows: ref[Rows]
    watch: Watch
    updates: list[list[LowRank]]

    def factors(self, others: Iterable[Tensor | None]) -> Iterable[Tensor]:
        """All factors, and other tensors."""
        yield from (tensor for tensor in others if tensor is not None)
        yield from (factor for some in self.updates for update in some for factor in (update.up, update.down))
