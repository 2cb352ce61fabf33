"""Errors of the surgery. Every one leaves the model as it was before the call."""

from __future__ import annotations

from collections.abc import Sequence

from weights.errors import listed


class AdapterError(ValueError):
    """Base of every error this package raises by itself."""


class HyperparameterError(AdapterError, TypeError):
    """A hyperparameter that a method does not have."""


class TargetError(AdapterError):
    """A pattern that matches nothing, or a layer that the method cannot adapt."""


class PatchNameError(AdapterError, KeyError):
    """A name that no patch has, or that one has already."""

    __str__ = ValueError.__str__  # KeyError would print the repr.


class PatchStateError(AdapterError, RuntimeError):
    """A call that does not fit the state of a patch: merging it twice, ejecting what is not injected."""


class LayerMismatchError(AdapterError):
    """An adapter file that does not fit the model: layers that are missing, or tensors of another shape."""


class BudgetError(AdapterError):
    """Adapters that do not fit the memory that they may have in a model."""


class RowsError(AdapterError):
    """A layer that cannot have a choice of patches for each row, because it is not given a row for each.

    Attributes:
        reason: What is wrong.
        path: The layer, where it is known.
    """

    def __init__(self, reason: str, path: str = "") -> None:
        where = f" The layer is {path}: leave it out of the patches, with exclude=." if path else ""
        super().__init__(reason + where)
        self.reason = reason
        self.path = path


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise one LayerMismatchError for all problems, if there are any."""
    if problems:
        raise LayerMismatchError(f"{what}: {listed(problems)}.")
