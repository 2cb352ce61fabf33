"""Test cases that only `make test-all` tries."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any

import hypothesis
import pytest


def exhaustive(*values: Any) -> Any:
    """A case that `make test` leaves out, of the values of its parameters."""
    return pytest.param(*values, marks=pytest.mark.exhaustive)


def examples(few: int, many: int, **others: Any) -> hypothesis.settings:
    """Settings for so many random examples: `few` in `make test`, `many` in `make test-all`."""
    return hypothesis.settings(max_examples=many if os.environ.get("EXHAUSTIVE") else few, **others)


def one_in(
    count: int, cases: Iterable[tuple[Any, ...]], key: Callable[[tuple[Any, ...]], object] = lambda case: None
) -> list[Any]:
    """Cases of which `make test` tries the first for each key, and one in `count` of all.

    `count` should not divide the length of an axis of a product, so that each value is tried on each axis.
    """
    found, seen = [], set()
    for number, case in enumerate(cases):
        tried = number % count == 0 or key(case) not in seen
        seen.add(key(case))
        found.append(pytest.param(*case) if tried else exhaustive(*case))
    return found
