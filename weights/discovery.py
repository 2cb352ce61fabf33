"""Finding what the modules of a package state: a format, a family, the layouts of a method."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from typing import TypeVar

T = TypeVar("T")


def stated(package: str, name: str, kind: type[T]) -> dict[str, list[T]]:
    """The constants of one name in the modules of a package, by module in alphabetical order.

    Subpackages are for what modules share, and are left out.

    Args:
        package: Dotted name of the package. Its modules are imported.
        name: The constant: an object of the kind, or a tuple of some. A module may lack it.
        kind: The class of the objects.

    Raises:
        TypeError: A constant is of another kind.
    """
    found: dict[str, list[T]] = {}
    for module in pkgutil.iter_modules(import_module(package).__path__):
        if module.ispkg:
            continue
        value = getattr(import_module(f"{package}.{module.name}"), name, ())
        found[module.name] = [*value] if isinstance(value, tuple) else [value]
        if not all(isinstance(item, kind) for item in found[module.name]):
            raise TypeError(f"{package}.{module.name}.{name} has to be a {kind.__name__}, or a tuple of some.")
    return found
