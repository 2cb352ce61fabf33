"""All-or-nothing changes."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """In this block Python does not look for cycles: what it would look through are the many objects made here."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def _all_or_nothing() -> Iterator[contextlib.ExitStack]:
    """Callbacks registered in this block are run, the last one first, when it raises."""
    with contextlib.ExitStack() as undo:
        yield undo
        undo.pop_all()
