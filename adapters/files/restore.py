"""Branches with the tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

import weights
from adapters.errors import refuse
from adapters.files.entries import Entry, build_entry, entries_of, mismatches_of, shared_mismatches
from adapters.files.resolve.resolved import ResolvedLayer
from adapters.methods.core.building import Mould, share, tied_to
from adapters.methods.core.method import Branch
from adapters.targets.target import Target


def restore(
    entries: Sequence[Entry],
    file: weights.AdapterFile,
    trainable: bool = False,
    everything: Sequence[Target] = (),
) -> list[tuple[Target, Branch]]:
    """Branches with the tensors of a file, and their targets.

    They take the tensors themselves where these have the right dtype and device.

    Args:
        entries: The layers, which were found to fit.
        file: The adapter, which has the tensors that layers share.
        trainable: Whether the tensors require gradients.
        everything: All targets of the model. Targets without an entry get the branch of an entry whose weight they use
            in the same way, for methods whose files name one of several tied layers.
    """
    shared = share((entry.method, entry.spec) for entry in entries)
    for common in shared.values():
        given = {name: file.shared[name] for name in common if name in file.shared}
        _fill({name: common[name] for name in given}, given)
    restored: list[tuple[Target, Branch]] = []
    uses: dict[object, tuple[Branch, Mapping[str, Tensor]]] = {}
    moulds: dict[object, _Mould] = {}
    built: list[Branch] = []
    taken = {id(entry.target) for entry in entries}
    for entry in entries:
        use, form = entry.use, entry.form
        first, same = uses.get(use, (None, entry.tensors))
        if first is not None and _equal(entry.tensors, same):  # They were tied when the file was made.
            restored.append((entry.target, tied_to(first)))
            continue
        mould = moulds.get(form)
        if mould is not None:
            branch = mould.cast(entry.tensors, trainable)
        else:
            branch = build_entry(entry, entry.spec, shared[entry.method])
            own = entry.method.file_tensors(branch)
            _fill(own, entry.tensors)
            built.append(branch)
            if (mould := _Mould.of(branch, own)) is not None:
                moulds[form] = mould
        uses[use] = branch, entry.tensors
        restored.append((entry.target, branch))
        if entry.method.tied_in_files:
            others = [other for other in everything if id(other) not in taken]
            tied = [other for other in others if (id(entry.method), other.tie_key(entry.method)) == use]
            restored += [(other, tied_to(branch)) for other in tied]
    for branch in built:
        for _, parameter in branch.named_weights():
            parameter.requires_grad_(trainable)
    return restored


def restore_all(layers: Sequence[ResolvedLayer[Target]], file: weights.AdapterFile) -> list[tuple[Target, Branch]]:
    """Branches for all layers, and their targets.

    Raises:
        LayerMismatchError: A layer does not fit its target; the message lists where.
    """
    entries, different = entries_of(layers, trainable=False)
    problems = [f"{path}: {problem}" for path, some in different.items() for problem in some]
    refuse("The adapter is for another model", problems + shared_mismatches(entries, file, partial=False))
    return restore(entries, file)


class _Mould:
    """A branch to make others of that differ only in their values, and the names of its parameters in a file."""

    def __init__(self, mould: Mould, names: Mapping[int, str]) -> None:
        self._mould = mould
        self._parameters = [(names[id(parameter)], parameter) for parameter in mould.parameters.values()]

    @classmethod
    def of(cls, branch: Branch, own: Mapping[str, Tensor]) -> _Mould | None:
        """The mould of a branch, unless there is more to it than the parameters that a file has."""
        mould, names = Mould.of(branch), {id(tensor): key for key, tensor in own.items()}
        fits = mould is not None and names.keys() == {id(parameter) for parameter in mould.parameters.values()}
        return cls(mould, names) if mould is not None and fits else None

    def cast(self, tensors: Mapping[str, Tensor], trainable: bool) -> Branch:
        """A branch with the values that a file has, which were found to fit."""
        values = [
            tensor if _is_alike(tensor := tensors[key], like) else tensor.view(like.shape).to(like)
            for key, like in self._parameters
        ]
        return self._mould.cast(values, trainable)


def _fill(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy tensors into others."""
    refuse("The tensors are for other layers", mismatches_of(own, given))
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(given[key].view(tensor.shape))


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.shape == other[name].shape and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )
