"""`Attachment`, a branch and where it belongs."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from adapters.adapter import Slot, WeakSlots
from adapters.errors import PatchStateError
from adapters.methods.core.method import Branch
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.targets.target import Target


@dataclass
class Attachment:
    """A branch and where it belongs. The layer and what holds it are not kept alive.

    Attributes:
        path: The path of the layer in the model.
        branch: The branch.
        layer: The layer, while the branch is not injected.
        slots: The slots of the layer, while the branch is not injected.
    """

    path: str
    branch: Branch
    layer: weakref.ref[nn.Module] | None
    slots: WeakSlots

    @classmethod
    def of(cls, target: Target, branch: Branch) -> Attachment:
        """The attachment of a new branch to a target."""
        return cls(target.path, branch, weakref.ref(target.module), WeakSlots(target.slots))

    @property
    def node(self) -> AdaptedLayer | None:
        """The adapted layer that holds the branch, while it is injected."""
        return self.branch.parent  # type: ignore[return-value]  # A branch has no other parent.

    @property
    def target(self) -> nn.Module | None:
        """The layer, or None when it is gone."""
        if (node := self.node) is not None:
            return node.base
        return None if self.layer is None else self.layer()

    @property
    def merged(self) -> bool:
        """Whether the layer computes the branch in its weights."""
        node = self.node
        return node is not None and bool(node.merged) and node.is_merged(self.branch)

    def occupied(self) -> tuple[nn.Module, list[Slot]]:
        """The layer and its slots, checked to be those the attachment was made for.

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
                raise PatchStateError(f"{self.path} is not the layer that the patch was made for any more.")
        return layer, slots

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "layer": None}

    def attach(self, layer: nn.Module, slots: list[Slot], name: str) -> None:
        """Add the branch to the adapted layer that is there, or to a new one in these slots."""
        parent, key = slots[0]
        found = parent._modules[key]
        node = found if isinstance(found, AdaptedLayer) else AdaptedLayer(layer)
        node.add_branch(name if self.branch.parameter == "weight" else f"{name}_{self.branch.parameter}", self.branch)
        if self.branch.training != layer.training:
            self.branch.train(layer.training)
        if node is not found:
            node._occupy(slots, self.slots)

    def detach(self) -> None:
        """Remove the branch, and the adapted layer with it when it was the last one."""
        if (node := self.node) is not None:
            if slots := node.slots:
                self.layer, self.slots = weakref.ref(node.base), node._outside
            node.remove_branch(self.branch)
            if slots and not node.branches:
                node._vacate(slots)
