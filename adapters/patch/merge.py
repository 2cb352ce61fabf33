"""Merging: a patch computed in the weights of its layers, for a while or for good."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adapters.errors import PatchStateError
from adapters.layers.quantized import is_quantized
from adapters.layers.sharded import is_sharded
from adapters.layers.weight import is_stored
from adapters.lowrank.accumulate import add
from adapters.methods.core.method import Active
from adapters.patch.freeze import replace_frozen
from adapters.patch.merge_in_place import in_place, memory_users
from adapters.patch.record import PatchRecord
from adapters.patch.registry import registered
from adapters.patch.surgery import check_may_leave, leave
from adapters.patch.transaction import transaction
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.runtime.merged_weights import Made


def is_merged(patch: PatchRecord) -> bool:
    """Whether every layer of a patch computes it in its weights."""
    return not patch.evicted and all(attachment.merged for attachment in patch.attachments)


def is_partly_merged(patch: PatchRecord) -> bool:
    """Whether any layer of a patch computes it in its weights."""
    return any(attachment.merged for attachment in patch.attachments)


def merge(patch: PatchRecord) -> None:
    """Merge a patch at its present scale at every layer.

    Raises:
        PatchStateError: The patch is not injected, merged already, or cannot be merged.
    """
    patch.require_injected()
    _require_mergeable(patch)
    if is_merged(patch):
        raise PatchStateError(f"The patch {patch.name!r} is merged already.")
    _merge_again(patch, included=True)


def unmerge(patch: PatchRecord) -> None:
    """Undo `merge` at every layer where the patch is merged.

    Raises:
        PatchStateError: The patch is merged nowhere.
    """
    patch.require_tensors()
    if not is_partly_merged(patch):
        raise PatchStateError(f"The patch {patch.name!r} is not merged.")
    _merge_again(patch, included=False)


def unmerge_and_leave(patch: PatchRecord) -> None:
    """Take a patch out of its model, and out of the weights before where it is merged.

    Raises:
        PatchStateError: The patch is not injected, or sharded together with its layers.
    """
    patch.require_injected()
    model = patch.model
    check_may_leave(patch)
    if is_partly_merged(patch):
        _merge_again(patch, included=False)
    leave(patch, model)


def _merge_again(patch: PatchRecord, included: bool) -> None:
    """Merge at each layer what other patches have merged there, and this one if it is to be included."""
    patch.reshard()
    made: Made = {}
    restored: Made = {}
    with transaction() as undo:
        for node, branches in patch.nodes():
            before = node.merged
            ours = [(branch, patch.scale) for branch in branches if included]
            undo.callback(node.merge, before, made=restored)
            node.merge([*_of_others(patch, before), *ours], made=made)


def merge_for_good(patch: PatchRecord) -> None:
    """Merge a patch into the weights of the base model at its present scale, and take it out of the model.

    Raises:
        PatchStateError: The patch is not injected, a weight is quantized, or computed from others and cannot be set,
            or a method cannot be merged.
    """
    patch.require_injected()
    _require_mergeable(patch)
    model = patch.model
    check_may_leave(patch)
    patch.reshard()
    nodes = [(node, [(branch, patch.scale) for branch in branches]) for node, branches in patch.nodes()]
    for node, ours in nodes:
        _require_replaceable(node, ours)
    users = memory_users(model)
    replaced: dict[int, list[nn.Parameter]] = {}
    made: Made = {}
    with torch.no_grad(), transaction() as undo:
        plans = [in_place(node, ours, users) for node, ours in nodes]
        for (node, ours), plan in zip(nodes, plans, strict=True):
            if plan is None:
                before, own = node.merged, {name: node.base_weight(name) for name in _names(ours)}
                new = node.merged_copies(own, ours, made)
                undo.callback(node.merge, before, own)
                node.merge(_of_others(patch, before), own=new, made=made)
                _note_replaced(replaced, own, new, ours)
        for plan in filter(None, plans):  # At the very end: it cannot be undone.
            add(plan.weight, plan.updates)
    replace_frozen(registered(model).values(), replaced)
    leave(patch, model)


def _note_replaced(
    replaced: dict[int, list[nn.Parameter]],
    old: dict[str, Tensor | None],
    new: dict[str, nn.Parameter | None],
    branches: Active,
) -> None:
    """Note which parameters take the place of which, by the ids of these. A bias that is new thaws with the weight."""
    for name, weight in new.items():
        former = old[branches[0][0].parameter] if old[name] is None else old[name]
        if weight is not None and not is_sharded(weight):
            replaced.setdefault(id(former), []).append(weight)


def _of_others(patch: PatchRecord, merged: Active) -> Active:
    return [(branch, scale) for branch, scale in merged if branch.switch is not patch]


def _names(branches: Active) -> list[str]:
    return [name for branch, _ in branches for name in branch.names]


def _require_mergeable(patch: PatchRecord) -> None:
    for attachment in patch.attachments:
        if not attachment.branch.names:
            raise PatchStateError(
                f"{attachment.path} cannot be merged: {type(attachment.branch.method).__name__} is no change of"
                " weights. Leave the patch in the model, and switch it by `enabled` or `adapters.use`."
            )


def _require_replaceable(node: AdaptedLayer, branches: Active) -> None:
    names = _names(branches)
    if any(is_quantized(node.base._parameters.get(name)) for name in names):
        raise PatchStateError(
            f"{node.path} is quantized, and quantizing the merged weight again would round it: merge into the original"
            " model and quantize that, or call merge() instead, which keeps a dense weight beside."
        )
    if not all(is_stored(node.base, name) for name in names):
        raise PatchStateError(
            f"{node.path} computes its weight from others: remove its parametrization, or call merge() instead."
        )
