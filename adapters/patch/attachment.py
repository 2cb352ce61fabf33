"""`Attachment`, a branch and where it belongs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from adapters.adapter import Slot, WeakSlots
from adapters.errors import PatchStateError
from adapters.methods.core.method import Branch
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.targets.target import Target


@dataclass
class Attachment:
    """Where a branch belongs: a layer, its path and its slots. The layer and what holds it are not kept alive."""

    path: str
    branch: Branch
    layer: weakref.ref[nn.Module] | None
    slots: WeakSlots

    @classmethod
    def of(cls, layer: Target, branch: Branch) -> Attachment:
        return cls(layer.paths[0], branch, weakref.ref(layer.module), WeakSlots(layer.slots))

    @property
    def node(self) -> AdaptedLayer | None:
        """The node that holds the branch, while it is injected."""
        return cast("AdaptedLayer | None", self.branch.parent)

    @property
    def target(self) -> nn.Module | None:
        """The layer, or None when it is gone."""
        if (node := self.node) is not None:
            return node.base
        return None if self.layer is None else self.layer()

    def occupied(self) -> tuple[nn.Module, list[Slot]]:
        """The layer and its slots, checked to be what they were.

        Raises:
            PatchStateError: The layer is no longer there.
        """
        layer = self.target
        slots = list(self.slots)
        if layer is None or not slots:
            raise PatchStateError(f"{self.path} is gone, with the model that the patch was made for.")
        for parent, key in slots:
            found = parent._modules.get(key)
            if (found.base if isinstance(found, AdaptedLayer) else found) is not layer:
                raise PatchStateError(f"{self.path} is not the layer any more that the patch was made for.")
        return layer, slots

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "layer": None}

    def attach(self, layer: nn.Module, slots: list[Slot], name: str) -> None:
        """Put the branch beside the layer, in the node that is there or in a new one."""
        parent, key = slots[0]
        found = parent._modules[key]
        node = found if isinstance(found, AdaptedLayer) else AdaptedLayer(layer)
        node.hold(name if self.branch.parameter == "weight" else f"{name}_{self.branch.parameter}", self.branch)
        if self.branch.training != layer.training:
            self.branch.train(layer.training)
        if node is not found:
            node._occupy(slots, self.slots)

    def detach(self) -> None:
        """Take the branch out, and the node too when it was the last one."""
        if (node := self.node) is not None:
            if slots := node.slots:
                self.layer, self.slots = weakref.ref(node.base), node._outside
            node.release(self.branch)
            if slots and not node.branches:
                node._vacate(slots)
