"""`MergingNode`, a node whose layer can have branches merged into its weights, for whatever reads these too."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from adapters.activation.mixed_batch import Rows
from adapters.layers.quantized import is_quantized
from adapters.layers.sharded import gather, is_sharded
from adapters.layers.weight import is_stored, read_weight
from adapters.methods.core.method import Active, Branch
from adapters.runtime.merged_weights import Made, adapted_weights, as_parameter, merged_copies
from adapters.runtime.node import Node
from adapters.runtime.placeholders import NoWeight, RowWeight


class MergingNode(Node):
    """A node with its weights: those of the base, the effective ones, and merging."""

    @property
    def weight(self) -> Tensor:
        """The weight that computes what this node computes: that of the layer while no patch is active."""
        return cast(Tensor, self._shown("weight"))

    def base_weight(self, name: str) -> Tensor | None:
        """A weight of the layer without any branch, merged or not."""
        if name not in self._displaced:
            return read_weight(self.base, name)
        weight = self._displaced[name]
        # While FSDP has gathered the parameters of the layer, displaced ones are gathered too.
        gathered = is_sharded(weight) and not is_sharded(self.base._parameters.get(name))
        return gather(weight) if weight is not None and gathered else weight

    def effective_weight(self, name: str) -> Tensor | None:
        """A weight of the layer with the active branches in it."""
        chosen = self.active_branches()
        weight = read_weight(self.base, name)
        if weight is not None and isinstance(chosen, Rows):
            return weight.detach().as_subclass(RowWeight)
        if weight is not None and any(not branch.names for branch, _ in chosen):
            return weight.detach().as_subclass(NoWeight)
        if isinstance(chosen, Rows) or uses(chosen) == uses(self._merged):
            return self._computed.get(name, weight)
        return self._weights(chosen).get(name, weight)

    def raw_parameter(self, name: str) -> Tensor | None:
        """A parameter of the layer, without what is merged into it, as it is stored: perhaps quantized."""
        return self._displaced[name] if name in self._displaced else self.base._parameters.get(name)

    def displaced(self) -> list[nn.Parameter]:
        """The parameters of the layer that merged ones stand in for."""
        return [weight for weight in self._displaced.values() if isinstance(weight, nn.Parameter)]

    def _shown(self, name: str) -> Tensor | None:
        """A weight for code that reads it past `forward`: quantized, if it is, while no branch changes it."""
        raw = self.base._parameters.get(name)
        if not is_quantized(raw) or isinstance(chosen := self.active_branches(), Rows):
            return self.effective_weight(name)
        untouched = all(branch.names and name not in branch.names for branch, _ in chosen)
        return raw if untouched else self.effective_weight(name)

    def _may_change(self, name: str) -> bool:
        """Whether the layer's own parameter may not be what this node computes with."""
        branches = self.branches
        if any(name in branch.names for branch in branches):
            return True
        return not all(branch.names for branch in branches) and self.base._parameters.get(name) is not None

    def _weights(self, active: Active) -> dict[str, Tensor | None]:
        """The weights that compute just these branches, where they are not those that the layer has."""
        names = [name for branch, _ in (*self._merged, *active) for name in branch.names]
        return adapted_weights({name: self.base_weight(name) for name in names}, active)

    @property
    def merged(self) -> Active:
        """The branches that are merged into the layer, with their strengths."""
        return list(self._merged)

    def is_merged(self, branch: Branch) -> bool:
        """Whether a branch is merged into the layer."""
        return any(item[0] is branch for item in self._merged)

    def is_merged_as(self, active: Active) -> bool:
        """Whether the merged branches are the first of the active ones, at the same strengths."""
        return uses(active[: len(self._merged)]) == uses(self._merged)

    def merge(self, branches: Active, own: Mapping[str, Tensor | None] | None = None, made: Made | None = None) -> None:
        """Merge these branches into the layer, and no others.

        The layer gets new weights; its own ones are kept aside unwritten, so that nothing has to be undone.

        Args:
            branches: The branches, with their strengths.
            own: Other weights to take for those of the base.
            made: Merged copies that were made for other layers: tied layers share theirs.
        """
        own = {**{name: self.base_weight(name) for name in _names(self._merged)}, **(own or {})}
        own = {**{name: self.base_weight(name) for name in _names(branches)}, **own}
        for name, weight in own.items():
            # A sharded parameter stays in its slot, which FSDP knows, and is written to: so a copy is kept.
            if weight is not None and weight is self.base._parameters.get(name) and is_sharded(weight):
                own[name] = as_parameter(cast(Tensor, weight).detach().clone(), weight)
        order = {_use(branch): place for place, branch in enumerate(self.branches)}
        branches = sorted(branches, key=lambda item: order.get(_use(item[0]), len(order)))
        outcome = self.merged_copies(own, branches, made)
        for name, weight in own.items():
            table = self._computed
            if is_stored(self.base, name):
                self._set_parameter(name, cast("nn.Parameter | None", outcome.get(name, weight)))
                table = self._displaced
            table.pop(name, None)
        for name in outcome:  # A weight that is computed from others stays so, and the outcome is used instead.
            stored = is_stored(self.base, name)
            (self._displaced if stored else self._computed)[name] = own[name] if stored else outcome[name]
        self._merged[:] = branches

    def _set_parameter(self, name: str, weight: nn.Parameter | None) -> None:
        """Give the layer another parameter, or other values if it is sharded."""
        there = self.base._parameters.get(name)
        if not is_sharded(there):
            self.base._parameters[name] = weight
        elif weight is not there:
            with torch.no_grad():
                there.copy_(weight)

    @staticmethod
    def merged_copies(
        own: Mapping[str, Tensor | None], branches: Active, made: Made | None = None
    ) -> dict[str, nn.Parameter | None]:
        """Weights with branches merged into them as new parameters, or those made of the same before.

        Args:
            own: The weights, among them all that the branches change.
            branches: The branches, with their strengths.
            made: Copies that were made before, to which new ones are added.
        """
        made = {} if made is None else made
        parts = tuple((scale, *map(id, branch.parameters())) for branch, scale in branches)
        sources = tuple(id(own[branch.parameter]) for branch, _ in branches)
        keys = {name: (id(own[name]), sources, parts, name) for name in _names(branches)}
        if not made.keys() >= set(keys.values()):
            with torch.no_grad():
                weights = merged_copies({name: own[name] for name in keys}, branches)
            for name, key in keys.items():
                like = own[name] if own[name] is not None else own[branches[0][0].parameter]
                made[key] = as_parameter(weights[name], like)
        return {name: made[key] for name, key in keys.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> MergingNode:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # Weights that the layer does not hold at the moment go where the layer goes: to a device, or a dtype.
        for table in (self._displaced, self._computed):
            if table:
                holder = nn.Module()
                holder._parameters = cast("dict[str, nn.Parameter | None]", table)
                holder._apply(fn)
        return self


def _names(branches: Active) -> list[str]:
    return [name for branch, _ in branches for name in branch.names]


def _use(branch: Branch) -> object:
    """Equal for a branch and its structural copies: of one patch, a weight has one."""
    return branch.switch, branch.parameter


def uses(active: Active) -> list[object]:
    """The branches and their strengths, equal for structural copies of the branches."""
    return [(_use(branch), scale) for branch, scale in active]
