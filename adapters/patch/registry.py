"""The patches of each model."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Collection
from typing import cast
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import nn

from adapters.activation.switch import Switch
from adapters.adapter import WeakSlots, find_all_slots
from adapters.errors import PatchNameError
from adapters.runtime.adapted_layer import AdaptedLayer, nodes

_numbers = itertools.count()


class Registered(Switch):
    """A patch, as the registry knows it.

    Attributes:
        number: Its place in the order of injection; -1 while it is not injected.
    """

    _model: weakref.ref[nn.Module] | None
    number: int

    def settle(self, model: nn.Module, here: Collection[AdaptedLayer]) -> None:
        """Make a model its own if all of its adapters are here, for the patch of a copy: of the model, or a part."""
        raise NotImplementedError


# Held while patches come and go, and while those that are there are looked for: so nobody sees one that is half there.
_changing = threading.RLock()
# The nodes in a model keep its patches alive, and a patch may keep its model alive: neither may be kept from here.
_known: WeakKeyDictionary[nn.Module, WeakValueDictionary[str, Registered]] = WeakKeyDictionary()


def registered(model: nn.Module) -> dict[str, Registered]:
    """The patches that are injected in a model, by name, in the order of their injection."""
    found = _known.get(model)
    if found is None:
        with _changing:
            found = _looked_up(model)
    return dict(found.items())


def _looked_up(model: nn.Module) -> WeakValueDictionary[str, Registered]:
    """The same, found in the model, or by another thread meanwhile."""
    found = _known.get(model)
    if found is None:
        here = dict.fromkeys(nodes(model))
        if copies := [node for node in here if not node.slots]:  # They learn where they are.
            for node, slots in find_all_slots(model, copies).items():
                node._outside = WeakSlots(slots)
        unique = {id(branch.switch): cast(Registered, branch.switch) for node in here for branch in node.branches}
        for patch in unique.values():
            if patch._model is None:
                patch.settle(model, here)
        ordered = sorted(unique.values(), key=lambda patch: patch.number)
        _known[model] = found = WeakValueDictionary((patch.name, patch) for patch in ordered)
    return found


def check_name(model: nn.Module, name: str) -> None:
    """Raise unless a new patch of a model may have that name."""
    if not (isinstance(name, str) and name):
        raise PatchNameError(f"A patch needs a name that is a string and not empty, not {name!r}.")
    if name in registered(model):
        raise PatchNameError(f"The model has a patch {name!r} already: eject it, or choose another name=.")
