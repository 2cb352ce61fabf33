"""Which patches act, and how strongly, in the current thread or async task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from adapters.choice import Rows, choosing, finite
from adapters.errors import AdapterError
from adapters.models import Model

if TYPE_CHECKING:
    from adapters.patch import Patch

RowChoice = str | Mapping[str, float] | Sequence[str] | None


@contextlib.contextmanager
def use(model: Model, *names: str | Mapping[str, float], rows: Sequence[RowChoice] | None = None) -> Iterator[None]:
    """In this block, and in this thread or async task only, let just these patches of a model act.

    Args:
        model: The patched model, or pipeline.
        names: Names of patches, which act at their own scale, or one mapping of names to scales. Without names, and
            without `rows`, no patch acts: the model is the base model.
        rows: One choice for each row of the batch instead: a name, several names, a mapping, or None for the base.
            The rows are those of each layer's input, so the layers that are adapted must be given the batch in the
            first dimension, or one row for all. A layer given anything else raises a `RowsError`, unless that happens
            to have as many rows: leave layers of relative positions, and separate experts, out of such patches.

    Raises:
        PatchNameError: The model has no patch of that name.
        AdapterError: Both names and rows are given, there are no rows, or a choice is no name, or a scale no number.
    """
    from adapters.patch import find, patches  # A patch needs this module to know whether it acts.

    def weights(choice: RowChoice) -> dict[Patch, float]:
        if choice is None:
            return {}
        if isinstance(choice, Mapping):
            return {find(model, name): finite(scale, f"The scale of {name!r}") for name, scale in choice.items()}
        listed = [choice] if isinstance(choice, str) else choice
        if not isinstance(listed, Sequence):
            raise AdapterError(f"A patch is chosen by its name, or by a mapping of names to scales, not by {choice!r}.")
        return {patch: patch.scale for patch in (find(model, name) for name in listed)}

    if rows is not None:
        if names:
            raise AdapterError("Pass names for the whole batch or rows= for each row, not both.")
        if isinstance(rows, str) or not rows:
            raise AdapterError(f"rows= needs a list with a choice for each row of the batch, not {rows!r}.")
        grouped = Rows([weights(choice) for choice in rows])
        chosen: dict[Patch, float | Rows] = dict.fromkeys(patches(model).values(), grouped)
    else:
        chosen = dict.fromkeys(patches(model).values(), 0.0)
        for choice in names:
            chosen.update(weights(choice))
    with choosing(chosen):
        yield
