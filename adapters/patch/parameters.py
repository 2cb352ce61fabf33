"""The tensors of a patch: named, in groups for an optimizer, and replaced."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters.errors import refuse
from adapters.layers.sharded import shard_like
from adapters.patch.record import PatchRecord
from adapters.patch.transaction import transaction
from adapters.runtime.merged_weights import Made


def named_weights(patch: PatchRecord) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters by the path of the layer and their name in the branch, those of tied layers once."""
    patch.reshard()
    seen: set[int] = set()
    for attachment in patch.attachments:
        for name, parameter in attachment.branch.named_weights():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{attachment.path}.{name}", parameter


def shared_weights(patch: PatchRecord) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained parameters that layers share, each once, by their name in the branches."""
    common = {name for attachment in patch.attachments for name in attachment.branch.common}
    for path, parameter in named_weights(patch):
        if (name := path.rpartition(".")[2]) in common:
            yield name, parameter


def named_tensors(patch: PatchRecord) -> Iterator[tuple[str, Tensor]]:
    """All tensors, also those that are never trained, named as by `named_weights`."""
    patch.reshard()
    seen: set[int] = set()
    for attachment in patch.attachments:
        branch = attachment.branch
        for name, tensor in (*branch.named_parameters(), *branch.named_buffers()):
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield f"{attachment.path}.{name}", tensor


def groups(patch: PatchRecord, parameters: Iterator[nn.Parameter], lr: float, ratio: float) -> list[dict[str, Any]]:
    """Parameter groups of LoRA+: the second has those that start at zero, and `ratio` times the learning rate."""
    plus_lr = {
        id(parameter)
        for attachment in patch.attachments
        for name, parameter in attachment.branch.named_weights()
        if name.partition(".")[0] in attachment.branch.method.plus_lr
    }
    slow: list[nn.Parameter] = []
    fast: list[nn.Parameter] = []
    for parameter in parameters:
        (fast if id(parameter) in plus_lr else slow).append(parameter)
    return [{"params": slow, "lr": lr}, {"params": fast, "lr": lr * ratio}]


def replace_tensors(patch: PatchRecord, state_dict: Mapping[str, Tensor]) -> None:
    """Replace the values of all tensors of a patch. What is merged is merged again, at the scale that it had.

    Raises:
        PatchStateError: The patch is evicted.
        LayerMismatchError: Names are missing or unexpected, or a shape differs.
    """
    patch.require_tensors()
    tensors = dict(named_tensors(patch))
    _check_fit(patch, tensors, state_dict)
    merged = {node: node.merged for node, branches in patch.nodes() if any(map(node.is_merged, branches))}
    made: Made = {}
    restored: Made = {}
    with torch.no_grad(), transaction() as undo:
        for node, before in merged.items():
            undo.callback(node.merge, before, made=restored)
            node.merge([(branch, scale) for branch, scale in before if branch.switch is not patch], made=made)
        for name, tensor in tensors.items():
            undo.callback(tensor.copy_, tensor.clone())
            tensor.copy_(shard_like(state_dict[name], tensor))
        for node, before in merged.items():
            node.merge(before, made=made)


def _check_fit(patch: PatchRecord, tensors: Mapping[str, Tensor], state_dict: Mapping[str, Tensor]) -> None:
    problems = [f"missing {name}" for name in tensors if name not in state_dict]
    problems += [f"unexpected {name}" for name in state_dict if name not in tensors]
    problems += [
        f"{name} has shape {tuple(state_dict[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in tensors.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    refuse(f"The tensors do not fit the patch {patch.name!r}", problems)
