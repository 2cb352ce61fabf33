"""The methods: one file each, with the formula, the initialisation and the names of the tensors, found by discovery."""

from typing import Any

from adapters.methods.core.catalogue import Catalogue

METHODS = Catalogue(__name__, __path__)
"""Every method by the name that files give it."""

register = METHODS.register


def __getattr__(name: str) -> Any:
    for method in METHODS.values():
        if method.__name__ == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["METHODS", "register", *(method.__name__ for method in METHODS.values())]
