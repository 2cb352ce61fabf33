"""Prints `adapters/__init__.pyi`: every public name and where it is, for type checkers and editors."""

import adapters


def stub() -> str:
    """The text of the file."""
    modules = {name: f"adapters.{module}" for name, module in adapters._MODULES.items()}
    modules |= {
        method.__name__: method.__module__
        for method in adapters.METHODS.values()
        if method.__module__.startswith("adapters.methods.")
    }
    lines = [
        f"from {modules[name]} import {name} as {name}"
        for name in sorted(modules, key=lambda name: (modules[name], name))
    ]
    return "\n".join(["# Written by `make docs`.", *lines]) + "\n"


if __name__ == "__main__":
    print(stub(), end="")
