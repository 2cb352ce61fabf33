"""Locks between threads and processes, released by the system when the holder ends, however it ends."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PAUSE = 0.001  # seconds between tries
_held: set[int] = set()


@contextmanager
def locked(path: Path, wait: float = 0.0) -> Iterator[bool]:
    """Lock of a file or a folder, held in this block.

    Args:
        path: The file or the folder, which stays as it is.
        wait: For how many seconds to try.

    Yields:
        Whether it is held: False where there are no locks, on Windows and on some network file systems.

    Raises:
        BlockingIOError: Another has it.
        OSError: The path cannot be opened.
    """
    if sys.platform == "win32":  # An open file cannot be renamed or removed there.
        yield False
        return
    descriptor = os.open(path, os.O_RDONLY)
    _held.add(descriptor)
    try:
        yield _lock(descriptor, time.monotonic() + wait)
    finally:
        if descriptor in _held:  # and not in a process that was forked meanwhile
            _held.remove(descriptor)
            os.close(descriptor)


def _lock(descriptor: int, until: float) -> bool:
    import fcntl

    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(_PAUSE)
        except OSError:
            return False
        else:
            return True


def _forget() -> None:
    """Release in a forked process the locks that its parent holds."""
    while _held:
        with suppress(OSError):
            os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
