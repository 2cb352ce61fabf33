"""Errors of the surgery. A call that raises one leaves the model as it was."""

from __future__ import annotations

from collections.abc import Sequence

from weights.errors import listed


class AdapterError(ValueError):
    """Base of every error that this package raises by itself.

    Example:
        >>> try:
        ...     adapters.inject(model, adapters.LoRA(rank=4), seed="one")
        ... except adapters.AdapterError as error:
        ...     print(error)
        seed= has to be an integer, not 'one'.
    """


class HyperparameterError(AdapterError, TypeError):
    """A hyperparameter that a method does not have.

    Example:
        >>> try:
        ...     adapters.LoRA(r=8)
        ... except adapters.HyperparameterError as error:
        ...     print(error)
        LoRA has no r=: its name here is rank=, as in LoRA(rank=8).
    """


class TargetError(AdapterError):
    """A pattern that matches nothing, or a layer that the method cannot adapt.

    Example:
        >>> try:
        ...     adapters.inject(model, adapters.LoRA(rank=4), targets="q_porj")
        ... except adapters.TargetError as error:
        ...     print(error)
        The pattern 'q_porj' matches no layer; near it are ...
    """


class PatchNameError(AdapterError, KeyError):
    """A name that no patch has, or that one has already.

    Example:
        >>> try:
        ...     adapters.use(model, "style").__enter__()
        ... except adapters.PatchNameError as error:
        ...     print(error)
        The model has no patch 'style': it has no patches.
    """

    __str__ = ValueError.__str__  # KeyError would print the repr.


class PatchStateError(AdapterError, RuntimeError):
    """A call that does not fit the state of a patch: merging it twice, ejecting it when it is not injected.

    Example:
        >>> try:
        ...     adapters.inject(model, adapters.LoRA(rank=4)).unmerge()
        ... except adapters.PatchStateError as error:
        ...     print(error)
        The patch 'default' is not merged.
    """


class LayerMismatchError(AdapterError):
    """An adapter file that does not fit the model: layers that are missing, or tensors of another shape.

    Example:
        >>> try:
        ...     adapters.inject(model, adapters.LoRA(rank=4)).load_state_dict({})
        ... except adapters.LayerMismatchError as error:
        ...     print(error)
        The tensors do not fit the patch 'default': missing ...
    """


class BudgetError(AdapterError):
    """Adapters that do not fit the budget of memory that a library has in a model.

    Example:
        >>> try:
        ...     adapters.Library(model, {"style": file}, budget=1).use("style").__enter__()
        ... except adapters.BudgetError as error:
        ...     print(error)
        A budget of 1 bytes is too small for the ... of 'style': ...
    """


class RowsError(AdapterError):
    """A mixed batch at a layer that is not given one row for each choice.

    Attributes:
        reason: The sentence without the layer.
        path: The path of the layer, where it is known.

    Example:
        >>> patch = adapters.inject(model, adapters.LoRA(rank=4), name="style")
        >>> try:
        ...     with adapters.use(model, rows=["style", None, None]):
        ...         y = model(x)
        ... except adapters.RowsError as error:
        ...     print(error)
        rows= has 3 entries for a batch of 2: ...
    """

    def __init__(self, reason: str, path: str = "") -> None:
        where = f" The layer is {path}: leave it out of the patches, with exclude=." if path else ""
        super().__init__(reason + where)
        self.reason = reason
        self.path = path


def refuse(what: str, problems: Sequence[str]) -> None:
    """Raise one LayerMismatchError that lists all problems, if there are any."""
    if problems:
        raise LayerMismatchError(f"{what}: {listed(problems)}.")
