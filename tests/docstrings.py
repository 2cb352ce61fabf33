"""Examples in docstrings: which public names lack one, and running them."""

from __future__ import annotations

import doctest
import inspect
from collections.abc import Mapping
from types import ModuleType

Named = Mapping[str, object]


class _Checker(doctest.OutputChecker):
    """Compares the printed output where the example gives it; runs the other lines for their errors alone."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return not want or super().check_output(want, got, optionflags)


def public_names(module: ModuleType) -> dict[str, object]:
    """Classes and functions of a module's `__all__`, by name."""
    every = {name: getattr(module, name) for name in module.__all__}
    return {name: value for name, value in every.items() if inspect.isclass(value) or inspect.isroutine(value)}


def undocumented(names: Named) -> list[str]:
    """Names whose own docstring has no `Example:` block with a `>>>` line."""
    return [name for name, value in names.items() if not has_example(value)]


def has_example(value: object) -> bool:
    _, found, block = (_docstring(value) or "").partition("Example:\n")
    return bool(found) and block.lstrip().startswith(">>> ")


def examples(names: Named) -> dict[str, object]:
    """Those of these names that have an example, and the methods of the same package that have one, each once."""
    found = {name: value for name, value in names.items() if has_example(value)}
    for value in names.values():
        for base in value.__mro__ if inspect.isclass(value) else ():
            if base.__module__.partition(".")[0] == value.__module__.partition(".")[0]:
                methods = {f"{base.__name__}.{key}": item for key, item in vars(base).items() if key != "__doc__"}
                found |= {key: item for key, item in methods.items() if has_example(item)}
    return found


def run_example(value: object, namespace: Mapping[str, object]) -> None:
    """Run the `>>>` lines of a docstring with these names, and compare what they print with what stands below them.

    In the expected output `...` stands for any text, and any white space for any other.

    Raises:
        AssertionError: A line raises, or prints something else.
    """
    name = getattr(value, "__qualname__", type(value).__name__)
    test = doctest.DocTestParser().get_doctest(_docstring(value) or "", dict(namespace), name, None, None)
    runner = doctest.DocTestRunner(_Checker(), False, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    said: list[str] = []
    failed, _ = runner.run(test, out=said.append)
    assert not failed, "".join(said)


def _docstring(value: object) -> str | None:
    own = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None)
    return own if isinstance(own, str) else None
