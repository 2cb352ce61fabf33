"""Real processes: the installed command, and programs in Python, of this checkout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
COMMAND = Path(sys.executable).with_name("fluxion")


def start(*command: object, settings: Mapping[str, str] | None = None, **options: Any) -> subprocess.Popen[Any]:
    """Start a process that SIGINT interrupts, as one at a terminal.

    A shell ignores SIGINT in what it runs in the background, and an ignored signal stays so in all that is started from
    there, these tests among them. A signal that is handled is not inherited: the new process has the default.

    Args:
        command: The program and its arguments.
        settings: Environment variables, beside those of this process.
        options: More options of `subprocess.Popen`; the output and the errors are pipes unless these say otherwise.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(settings or {})}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen([*map(str, command)], env=environment, **options)
    finally:
        signal.signal(signal.SIGINT, before)


def installed(*arguments: object, **settings: str) -> subprocess.Popen[bytes]:
    """Start the installed command."""
    return start(COMMAND, *arguments, settings=settings)
