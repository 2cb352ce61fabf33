"""The registry of the patches that are injected in each model."""

from __future__ import annotations

import difflib
import itertools
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar, cast
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn

from adapters.adapter import WeakSlots, base_modules, find_all_slots
from adapters.errors import PatchNameError
from adapters.patch.record import PatchRecord
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.targets.target import all_targets

P = TypeVar("P", bound=PatchRecord)

# Held while patches come and go, and while they are looked for: so nobody sees one that is half there.
changing = threading.RLock()


@dataclass(frozen=True, slots=True)
class _Entry:
    """Patches and members of a model, as they were when it was looked through.

    Attributes:
        patches: Its patches by name.
        members: The ids of the modules that it had.
        number: Position in the order in which models were looked through.
        since: The number of the first time that this model was.
    """

    patches: WeakValueDictionary[str, PatchRecord]
    members: frozenset[int]
    number: int
    since: int

    def outlives(self, changed: _Entry) -> bool:
        """Whether it holds after a change in another model: one that has no module in common with this one.

        It has to be known from after the other one was there: before, that was perhaps not its part yet.
        """
        return self.number > changed.since and self.members.isdisjoint(changed.members)


# The nodes in a model keep its patches alive, and a patch may keep its model alive: neither may be kept from here.
_entries: WeakKeyDictionary[nn.Module, _Entry] = WeakKeyDictionary()
_since: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_lookups, _injections = itertools.count(), itertools.count()


def next_number() -> int:
    """The position of a new patch in the order of injection."""
    return next(_injections)


def registered(model: nn.Module) -> dict[str, PatchRecord]:
    """The patches that are injected in a model, by name, in the order of their injection.

    A model that is made a part of another by hand, when both have been looked through, counts as a part from the next
    injection into the other on.
    """
    entry = _entries.get(model)
    if entry is None:
        with changing:
            entry = _entries.get(model) or _look_through(model)
    return dict(entry.patches.items())


def update(model: nn.Module, patches: Mapping[str, PatchRecord]) -> None:
    """Record the patches of a model after one has come or gone.

    What was found in other models is dropped if they have a module in common with this one: one is a part of the
    other, or they share a component.
    """
    entry = _entries.get(model) or _look_through(model)
    for other, found in list(_entries.items()):
        if other is not model and not found.outlives(entry):
            del _entries[other]
    _entries[model] = replace(entry, patches=WeakValueDictionary(patches))


def _look_through(model: nn.Module) -> _Entry:
    """Find the patches in a model."""
    modules = list(base_modules(model))
    here = dict.fromkeys(module for module in modules if isinstance(module, AdaptedLayer))
    if copies := [node for node in here if not node.slots]:  # They learn where they are.
        for node, slots in find_all_slots(model, copies).items():
            node._outside = WeakSlots(slots)
    unique = {id(branch.switch): cast(PatchRecord, branch.switch) for node in here for branch in node.branches}
    for patch in unique.values():
        if not patch.is_bound:
            _bind_copy(patch, model, here)
    ordered = sorted(unique.values(), key=lambda patch: patch.number)
    found = WeakValueDictionary((patch.name, patch) for patch in ordered)
    number = next(_lookups)
    since = _since.setdefault(model, number)
    _entries[model] = entry = _Entry(found, frozenset(map(id, modules)), number, since)
    return entry


def _bind_copy(patch: PatchRecord, model: nn.Module, here: Collection[AdaptedLayer]) -> None:
    """Bind the patch of a copied model, or of a copied part of one, to the model that has all of its nodes."""
    attachments = [attachment for attachment in patch.attachments if attachment.node is not None]
    if any(attachment.node not in here for attachment in attachments):
        return
    patch.bind(model)
    patch.attachments = attachments
    paths = {(target.module, target.parameter): target.path for target in all_targets(model)}
    for attachment in attachments:
        attachment.path = paths[cast(AdaptedLayer, attachment.node).base, attachment.branch.parameter]


def check_name(model: nn.Module, name: str) -> None:
    """Raise a PatchNameError unless a new patch of a model may have that name."""
    if not (isinstance(name, str) and name):
        raise PatchNameError(f"A patch needs a name that is a string and not empty, not {name!r}.")
    if name in registered(model):
        raise PatchNameError(f"The model has a patch {name!r} already: eject it, or choose another name=.")


def named(patches: Mapping[str, P], name: str) -> P:
    """The patch of that name among those of a model.

    Raises:
        PatchNameError: There is none.
    """
    if name not in patches:
        near = difflib.get_close_matches(name, patches, n=1) or list(patches)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else "it has no patches."
        raise PatchNameError(f"The model has no patch {name!r}: {hint}")
    return patches[name]
