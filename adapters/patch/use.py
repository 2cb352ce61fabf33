"""`use`: the patches that are active, and how strongly, in the current thread or async task."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

from adapters.activation.context import activated
from adapters.activation.mixed_batch import Rows
from adapters.activation.switch import Switch, finite
from adapters.errors import AdapterError
from adapters.patch.patch import Patch, patches
from adapters.patch.registry import named
from adapters.targets.models import Model

RowChoice = str | Mapping[str, float] | Sequence[str] | None


@contextlib.contextmanager
def use(model: Model, *names: str | Mapping[str, float], rows: Sequence[RowChoice] | None = None) -> Iterator[None]:
    """Make just these patches of a model active, in the block, and in this thread or async task only.

    Args:
        model: The patched model, or pipeline.
        names: Names of patches, which act at their own scale, or one mapping of names to scales. Without names, and
            without `rows`, no patch is active: the model is the base model.
        rows: A mixed batch instead: for each row a name, several names, a mapping, or None for the base. The rows are
            those of each layer's input, so the layers that are adapted must be given the batch in the first dimension,
            or one row for all. A layer given anything else raises a `RowsError`, unless that happens to have as many
            rows: leave layers of relative positions, and separate experts, out of such patches.

    Raises:
        PatchNameError: The model has no patch of that name.
        AdapterError: Both names and rows are given, there are no rows, or a choice is no name, or a scale no number.

    Example:
        >>> patch = adapters.inject(model, adapters.LoRA(rank=4), name="style")
        >>> with adapters.use(model, {"style": 0.5}):
        ...     y = model(x)
        >>> with adapters.use(model, rows=["style", None]):
        ...     y = model(x)  # a batch of 2
    """
    choices = choices_of(names, rows)
    with activated(resolved(choices, patches(model), rows is not None)):
        yield


Choice = Mapping[str, float | None]
"""Names of patches, and how strongly each acts: None is its own scale."""


def choices_of(names: Sequence[RowChoice], rows: Sequence[RowChoice] | None) -> list[Choice]:
    """The arguments of `use` in one form: a choice for each row, or those that the whole batch has together.

    Raises:
        AdapterError: Both names and rows are given, there are no rows, or a choice is no name, or a scale no number.
    """
    if rows is None:
        return [_choice(choice) for choice in names]
    if names:
        raise AdapterError("Pass names for the whole batch or rows= for each row, not both.")
    if isinstance(rows, str) or not rows:
        raise AdapterError(f"rows= needs a list with a choice for each row of the batch, not {rows!r}.")
    return [_choice(choice) for choice in rows]


def _choice(choice: RowChoice) -> Choice:
    if choice is None:
        return {}
    if isinstance(choice, Mapping):
        return {name: finite(scale, f"The scale of {name!r}") for name, scale in choice.items()}
    listed = [choice] if isinstance(choice, str) else choice
    if not isinstance(listed, Sequence):
        raise AdapterError(f"A patch is chosen by its name, or by a mapping of names to scales, not by {choice!r}.")
    return dict.fromkeys(listed)


def resolved(choices: Iterable[Choice], known: Mapping[str, Patch], by_row: bool) -> dict[Switch, float | Rows]:
    """The activation of known patches in which just those in the choices are active.

    Raises:
        PatchNameError: No patch has one of the names.
    """
    weights = [_weights(choice, known) for choice in choices]
    if by_row:
        return dict.fromkeys(known.values(), Rows(weights))
    chosen: dict[Switch, float | Rows] = dict.fromkeys(known.values(), 0.0)
    for some in weights:
        chosen.update(some)
    return chosen


def _weights(choice: Choice, known: Mapping[str, Patch]) -> dict[Switch, float]:
    found = {named(known, name): scale for name, scale in choice.items()}
    return {patch: patch.scale if scale is None else scale for patch, scale in found.items()}
