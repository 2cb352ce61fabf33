"""The methods, found by discovery: a file for each, with its hyperparameters, tensors and formula."""

from typing import Any

from adapters.methods.core.catalogue import Catalogue

METHODS = Catalogue(__name__, __path__)
"""Every method by its key in files."""

register = METHODS.register


def __getattr__(name: str) -> Any:
    for method in METHODS.values():
        if method.__name__ == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["METHODS", "register", *(method.__name__ for method in METHODS.values())]
