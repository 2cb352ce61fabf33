"""Checks of a method as it is declared and called: hints for unknown hyperparameters, and former names of hooks."""

from __future__ import annotations

import inspect
from abc import ABC
from collections.abc import Iterable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any, ClassVar, Self

from adapters.errors import HyperparameterError

_COMPUTES = frozenset({"update", "change", "delta", "run"})
_FORMER_HOOKS = {"beside": "bypass", "check_site": "check_spec", "names": "changes"}
_ELSEWHERE = {
    "dim": "rank=8",
    "init_lora_weights": 'init="pissa"',
    "lora_alpha": "alpha=16",
    "lora_dim": "rank=8",
    "lora_dropout": "dropout=0.1",
    "lora_rank": "rank=8",
    "network_alpha": "alpha=16",
    "network_dim": "rank=8",
    "oft_block_size": "block_size=32",
    "projection_prng_key": "seed=0",
    "r": "rank=8",
    "use_rslora": "rslora=True",
}
"""Hyperparameters in other libraries, and examples of them here."""
_OF_INJECT = {"target_modules": "targets", "exclude_modules": "exclude"}
"""Settings of a method in other libraries that are arguments of `adapters.inject`."""


class Declared(ABC):  # noqa: B024 - subclasses may have abstract methods
    """Base of `Method`, for what a class of methods says by being declared.

    Attributes:
        is_low_rank: Whether `W + s U D` says it all, with the factors of a `LowRank`. False in a subclass that states
            a computation of its own, unless it says otherwise.
    """

    is_low_rank: ClassVar[bool] = False

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        known = getattr(cls, "__dataclass_fields__", {})
        if not kwargs.keys() <= known.keys():
            _refuse_unknown(cls, kwargs)
        return super().__new__(cls)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = vars(cls)
        if _COMPUTES & own.keys() and "is_low_rank" not in own:
            cls.is_low_rank = False
        for former, name in _FORMER_HOOKS.items():  # Of methods that were written for earlier releases.
            if callable(own.get(former)) and name not in own:
                setattr(cls, name, own[former])


def _refuse_unknown(kind: type[Any], given: Iterable[str]) -> None:
    """Raise a HyperparameterError for the first name that a method has no hyperparameter of."""
    parameters = inspect.signature(kind.__init__).parameters  # A class may have an `__init__` of its own.
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [field.name for field in fields(kind) if field.init]
    for name in given:
        if name not in parameters:
            raise HyperparameterError(f"{kind.__name__} has no {name}=: {_hint(kind.__name__, name, known)}")


def _hint(method: str, name: str, known: list[str]) -> str:
    if name in _OF_INJECT:
        return f"layers are named at injection, as in adapters.inject(model, {method}(), {_OF_INJECT[name]}=...)."
    if name == "use_dora":
        return "DoRA is a method of its own, as in adapters.DoRA(rank=8)."
    example = _ELSEWHERE.get(name, "")
    here = example.partition("=")[0]
    if here in known:
        return f"its name here is {here}=, as in {method}({example})."
    if near := get_close_matches(name, known, 1):
        return f"did you mean {near[0]}=?"
    return f"it has {', '.join(f'{one}=' for one in known)}." if known else "it has no hyperparameters."
