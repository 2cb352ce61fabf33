"""What is public in `adapters`: there when it is asked for, whatever was imported before."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import adapters
import adapters.methods

# Modules whose names are those of functions, and one that imports much.
ORDERS = ["adapters.methods", "adapters.combine", "adapters.initialize", "adapters.disk", "adapters.cli"]


def test_all_is_there_and_no_module_is_in_its_place() -> None:
    assert len(adapters.__all__) == len(set(adapters.__all__)) > 50
    for name in adapters.__all__:
        value = getattr(adapters, name)
        assert not isinstance(value, ModuleType)
        assert name in dir(adapters)
    assert callable(adapters.methods) and callable(adapters.combine) and callable(adapters.initialize)


def test_type_checkers_are_told_the_same() -> None:
    tree = ast.parse(Path(adapters.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told: dict[str, str] = {}
    for statement in block.body:
        assert isinstance(statement, ast.ImportFrom) and statement.module
        module = statement.module.removeprefix("adapters.")
        names = [alias.name for alias in statement.names]
        told |= dict.fromkeys(sys.modules["adapters.methods"].__all__ if names == ["*"] else names, module)
    assert told == adapters._HOMES


EACH_FIRST = """
import importlib, os, sys
import torch.distributed.tensor.parallel, torch._dynamo, weights
assert "adapters" not in sys.modules
for first in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(first)
        from adapters import *
        import adapters.methods, adapters.combine, adapters.initialize
        from adapters.methods import register as again
        assert all(callable(one) for one in (adapters.methods, adapters.combine, adapters.initialize))
        assert adapters.LoRA is LoRA and adapters.methods is methods and register is again
        os._exit(0)
    assert os.wait()[1] == 0, first
"""


@pytest.mark.skipif(sys.platform == "win32", reason="it forks")
def test_the_order_of_imports_makes_no_difference() -> None:
    root = Path(adapters.__file__).parents[1]
    subprocess.run([sys.executable, "-c", EACH_FIRST, *ORDERS], check=True, cwd=root)


def test_what_there_is_not_is_an_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="module 'adapters' has no attribute 'LoRa'"):
        adapters.LoRa  # noqa: B018
    assert not hasattr(adapters, "__wrapped__")
