"""Surgery: the branches of a patch into its model, and out without a trace."""

from __future__ import annotations

from torch import nn

from adapters.errors import PatchStateError
from adapters.layers.sharded import check_leaving
from adapters.patch.freeze import freeze_base, thaw_base
from adapters.patch.record import PatchRecord
from adapters.patch.registry import changing, check_name, next_number, registered, update
from adapters.patch.transaction import transaction


def enter(patch: PatchRecord) -> None:
    """Attach the branches of a patch to their layers.

    Raises:
        PatchStateError: The patch is injected already, or its layers are no longer in the model.
        PatchNameError: Another patch of the model has its name by now.
    """
    with changing:
        patch.require_tensors()
        if patch.injected:
            raise PatchStateError(f"The patch {patch.name!r} is injected already.")
        model = patch.model
        check_name(model, patch.name)
        others = registered(model)
        occupied = [(attachment, *attachment.occupied()) for attachment in patch.attachments]
        key = patch.name.replace(".", "_")
        with transaction() as undo:
            undo.callback(update, model, others)
            undo.callback(setattr, patch, "number", -1)
            patch.number = next_number()
            undo.callback(_detach, patch)
            for attachment, layer, slots in occupied:
                attachment.attach(layer, slots, f"{attachment.branch.method.key}_{key}")
            if patch.freezes_base:
                undo.callback(thaw_base, patch, model)
                freeze_base(patch, model)
            update(model, {**others, patch.name: patch})


def leave(patch: PatchRecord, model: nn.Module) -> None:
    """Detach the branches of a patch that is not merged from its model, and thaw what it froze."""
    with changing:
        others = {name: other for name, other in registered(model).items() if other is not patch}
        _detach(patch)
        patch.number = -1
        update(model, others)
        thaw_base(patch, model, others.values())


def check_may_leave(patch: PatchRecord) -> None:
    """Raise a PatchStateError for a layer that cannot be without its branches, as it is a unit of FSDP with them."""
    check_leaving((one.path, node) for one in patch.attachments if (node := one.node) is not None)


def evict(patch: PatchRecord) -> None:
    """Free the branches of an ejected patch for good and at once: the patch and they hold each other."""
    patch.attachments = []


def _detach(patch: PatchRecord) -> None:
    for attachment in reversed(patch.attachments):
        attachment.detach()
