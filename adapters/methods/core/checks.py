"""Checks of hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from adapters.errors import AdapterError, TargetError


def need(holds: bool, method: object, what: str, value: object) -> None:
    """Raise an AdapterError that names the need of a method, unless it holds."""
    if not holds:
        raise AdapterError(f"{type(method).__name__} needs {what}, not {value!r}.")


def is_integer(value: object, least: float = -math.inf) -> bool:
    """Whether a hyperparameter is an integer of at least `least`, and not a boolean."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any) -> bool:
    """Whether a value is a finite number, an integer one of at most 64 bits, as torch multiplies by."""
    return math.isfinite(value) if isinstance(value, float) else isinstance(value, int) and abs(value) < 2**63


def need_rank(method: Any) -> None:
    """Check `rank`."""
    need(is_integer(method.rank, 1), method, "a rank that is an integer of 1 or more", method.rank)


def need_alpha(method: Any) -> None:
    """Check `alpha`, and set it to the rank if it is None."""
    if method.alpha is None:
        object.__setattr__(method, "alpha", float(method.rank))
    need(is_number(method.alpha), method, "an alpha that is a finite number", method.alpha)


def alpha_of(method: Any) -> float:
    """`alpha`, in which `need_alpha` leaves no None."""
    alpha: float = method.alpha
    return alpha


def need_number(method: Any, name: str) -> None:
    """Check that a hyperparameter is a finite number."""
    value = getattr(method, name)
    need(is_number(value), method, f"{name} to be a finite number", value)


def need_count(method: Any, name: str) -> None:
    """Check that a hyperparameter is an integer of 1 or more."""
    value = getattr(method, name)
    need(is_integer(value, 1), method, f"{name} to be an integer of 1 or more", value)


def need_seed(method: Any) -> None:
    """Check `seed`."""
    need(is_integer(method.seed), method, "a seed that is an integer", method.seed)
    need(-(2**63) <= method.seed < 2**63, method, "a seed of 64 bits", method.seed)


def need_choice(method: Any, name: str, choices: Iterable[str]) -> None:
    """Check that a hyperparameter is one of some names."""
    value, known = getattr(method, name), tuple(choices)
    article = "an" if name[0] in "aeiou" else "a"
    need(value in known, method, f"{article} {name} out of {', '.join(known)}", value)


def need_dropout(method: Any) -> None:
    """Check `dropout`."""
    fits = is_number(method.dropout) and 0 <= method.dropout < 1
    need(fits, method, "a dropout of 0 or more and less than 1", method.dropout)


def refuse_dropout(method: Any, layer: nn.Module) -> None:
    """Raise a TargetError if a method has dropout at a layer that it adapts through the weight, without its inputs."""
    if method.dropout:
        raise TargetError(
            f"A {type(layer).__name__} is adapted through its weight, where no input can be dropped: give it a"
            f" {type(method).__name__} with dropout=0, or exclude it."
        )
