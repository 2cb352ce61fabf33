"""Every public class and function of adapters has an example in its docstring; those of no other test are run here."""

from __future__ import annotations

import pytest
from torch import nn

import adapters
import fluxion as fl
from tests.adapters import test_file_examples, test_method_docstrings, test_patch_docstrings
from tests.docstrings import public_names, run_example, undocumented

NAMES = public_names(adapters)
ELSEWHERE = {
    *(thing.__name__ for thing in test_method_docstrings.CLASSES),
    adapters.register.__name__,
    *test_patch_docstrings.NAMES,
    *test_file_examples.NAMES,
}


def test_every_public_name_has_an_example() -> None:
    assert undocumented(NAMES) == []


@pytest.mark.parametrize("name", sorted(NAMES.keys() - ELSEWHERE))
def test_examples_run(name: str) -> None:
    model = fl.Chain(fl.Linear(8, 16), fl.ReLU(), fl.Linear(16, 4))
    before = list(model)
    run_example(NAMES[name], {"adapters": adapters, "fl": fl, "nn": nn, "model": model})
    for patch in adapters.patches(model).values():
        patch.eject()
    assert list(model) == before
