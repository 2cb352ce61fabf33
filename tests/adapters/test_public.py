"""What is public in `adapters`: there when it is asked for, whatever was imported before."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import adapters

ORDERS = ["adapters.methods", "adapters.patch.combine", "adapters.reports", "adapters.files.merge", "adapters.cli"]


def test_all_is_there_and_no_module_is_in_its_place() -> None:
    assert len(adapters.__all__) == len(set(adapters.__all__)) > 50
    for name in adapters.__all__:
        value = getattr(adapters, name)
        assert not isinstance(value, ModuleType)
        assert name in dir(adapters)


def test_type_checkers_are_told_the_same() -> None:
    site = Path(adapters.__file__).parents[1] / "docs" / "site" / "public_names.py"
    told = Path(adapters.__file__).with_suffix(".pyi").read_text(encoding="utf-8")
    assert told == runpy.run_path(str(site))["stub"](), "run `make docs`"
    assert {line.rpartition(" ")[2] for line in told.splitlines()[1:]} == {*adapters.__all__}


def test_submodules_are_imported_in_the_ordinary_way() -> None:
    code = "import adapters.methods.lora as l, adapters.reports as r, adapters; assert l.LoRA is adapters.LoRA, r"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(adapters.__file__).parents[1])


def test_names_of_the_last_release_are_known() -> None:
    assert adapters.Site is adapters.WeightSpec and adapters.Adapted is adapters.AdaptedLayer


EACH_FIRST = """
import importlib, os, sys
import torch.distributed.tensor.parallel, torch._dynamo, weights
assert "adapters" not in sys.modules
for first in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(first)
        from adapters import *
        import adapters
        from adapters.methods import register as again
        assert all(callable(one) for one in (adapters.combine, adapters.initialize, adapters.report))
        assert adapters.LoRA is LoRA and adapters.METHODS is METHODS and register is again
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
