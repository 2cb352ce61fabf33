"""Transactions: where every change of a model registers how it is undone."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def transaction() -> Iterator[contextlib.ExitStack]:
    """Roll back the block if it raises: callbacks that were registered in it run, the last one first.

    A callback is registered before the change that it undoes, so that no interrupt comes between the two; so it has
    to be harmless where that change has not been made yet.
    """
    with contextlib.ExitStack() as undo:
        yield undo
        undo.pop_all()


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Pause the garbage collector, which would go through the many objects that the block makes."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
