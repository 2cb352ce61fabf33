"""`PatchRecord`, the state of a patch that surgery, merging and saving work on."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn

from adapters.activation.switch import Switch
from adapters.errors import PatchStateError
from adapters.layers.sharded import reshard
from adapters.methods.core.method import Branch
from adapters.patch.attachment import Attachment
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.targets.models import Models


class PatchRecord(Switch):
    """A switch with the model and the attachments of a patch.

    Attributes:
        attachments: The branches and where they belong; none once the patch is evicted.
        freezes_base: Whether the base model is frozen while the patch is injected.
        frozen: The parameters of the base that it froze.
        number: Position in the order of injection; -1 while it is not injected.
    """

    def __init__(
        self, name: str, model: nn.Module, attachments: Sequence[Attachment], scale: float, freezes: bool
    ) -> None:
        super().__init__(name, scale)
        self.bind(model)
        self.attachments = list(attachments)
        self.freezes_base = freezes
        self.frozen: list[nn.Parameter] = []
        self.number = -1
        for attachment in attachments:
            attachment.branch.__dict__["switch"] = self  # Past nn.Module.__setattr__, which is slow.

    def bind(self, model: nn.Module) -> None:
        """Make this the model of the patch, which is not kept alive."""
        self._model: weakref.ref[nn.Module] | None = weakref.ref(model)
        self._models = model if isinstance(model, Models) else None  # Nothing else keeps it.

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_model": None, "_models": None}

    @property
    def is_bound(self) -> bool:
        """Whether the model is known: not so in a copy until `adapters.patches` is called with the copied model."""
        return self._model is not None

    @property
    def bound_model(self) -> nn.Module | None:
        """The model, or None where it is gone or not known."""
        return None if self._model is None else self._model()

    @property
    def model(self) -> nn.Module:
        """The model this patch was made for.

        Raises:
            PatchStateError: The model is gone, or not known yet.
        """
        if self._model is None:
            raise PatchStateError(
                f"The patch {self.name!r} was copied, and its model is not known yet: call adapters.patches with the"
                " model first, or if it is in several models, with the pipeline or the dict of them."
            )
        model = self._model()
        if model is None:
            raise PatchStateError(f"The model of the patch {self.name!r} is gone.")
        return model

    @property
    def injected(self) -> bool:
        """Whether its branches are in the model."""
        return self.number >= 0

    @property
    def evicted(self) -> bool:
        """Whether it has given its tensors up for good, as a library does with what has to leave."""
        return not self.attachments

    def require_injected(self) -> None:
        """Raise a PatchStateError unless the patch is injected."""
        self.require_tensors()
        if not self.injected:
            raise PatchStateError(f"The patch {self.name!r} is not injected: call inject() first.")

    def require_tensors(self) -> None:
        """Raise a PatchStateError if the patch is evicted."""
        if self.evicted:
            raise PatchStateError(f"The patch {self.name!r} was evicted, and its tensors are freed: load it again.")

    def nodes(self) -> Iterator[tuple[AdaptedLayer, list[Branch]]]:
        """Each adapted layer with the branches that it has of this patch."""
        nodes = {id(node): node for attachment in self.attachments if (node := attachment.node) is not None}
        for node in nodes.values():
            yield node, [branch for branch in node.branches if branch.switch is self]

    def reshard(self) -> None:
        """Let the parameters of the model be sharded, as they are outside of `forward`."""
        if (model := self.bound_model) is not None:
            reshard(model)

    def path_of(self, branch: object) -> str:
        return next((attachment.path for attachment in self.attachments if attachment.branch is branch), "")
