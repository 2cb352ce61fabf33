"""Examples in the docstrings of fluxion: every public class and function has one, and each is run."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fluxion
from fluxion import copying
from fluxion.copying import lazy_attribute
from tests.docstrings import examples, public_names, run_example, undocumented

NAMES = public_names(fluxion)
EXAMPLES = {
    **examples(NAMES),
    "fluxion": fluxion,
    "Template": copying.Template,
    "lazy_attribute": lazy_attribute,
}
NAMESPACE = {"torch": torch, "fl": fluxion, "lazy_attribute": lazy_attribute, "Template": copying.Template}


def test_every_public_name_has_an_example() -> None:
    assert undocumented(NAMES) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run(name: str) -> None:
    run_example(EXAMPLES[name], NAMESPACE)


# The checker itself


def plain() -> None:
    """Nothing to run."""


def prints(text: str) -> Any:
    def example() -> None: ...

    example.__doc__ = f"An example.\n\n    Example:\n{text}"
    return example


def test_a_name_without_an_example_is_found() -> None:
    class Inherits(fluxion.ReLU):
        pass

    names = {"plain": plain, "Inherits": Inherits, "ReLU": fluxion.ReLU, "empty": prints("        nothing")}
    assert undocumented(names) == ["plain", "Inherits", "empty"]


@pytest.mark.parametrize("text", ["        >>> 1 + 1\n        3\n", "        >>> missing\n"])
def test_an_example_that_is_wrong_fails(text: str) -> None:
    with pytest.raises(AssertionError):
        run_example(prints(text), {})


def test_output_is_compared_where_it_is_given() -> None:
    run_example(prints("        >>> 1 + 1\n        >>> 2 + 2\n        4\n"), {})
