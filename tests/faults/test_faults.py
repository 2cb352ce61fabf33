"""Every fault on every operation, a few times each; `python -m tests.faults` tries them thousands of times."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.thinned import exhaustive


@pytest.mark.skipif(sys.platform != "linux", reason="it forks, and kills")
@pytest.mark.parametrize(("rounds", "seconds"), [(2, 0.1), exhaustive(20, 2.0)])
def test_nothing_is_lost(rounds: int, seconds: float) -> None:
    """In a process of its own, which has one thread: what is forked from several may wait forever."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.faults",
            "--rounds",
            str(rounds),
            "--seconds",
            str(seconds),
            "--seed",
            str(os.getpid()),
        ],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    kills = re.search(r"`kill -9` ([\d,]+) times", done.stdout)
    assert kills is not None and int(kills[1].replace(",", "")) > 12 * rounds
