"""What is asked of the command without work for a model is there at once: nothing heavy is imported for it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

import adapters
from adapters.cli import main
from tests.processes import installed

HEAVY = ["torch", "numpy", "rich", "safetensors", "huggingface_hub", "weights", "fluxion"]


def imported(*arguments: str) -> set[str]:
    """Which of the heavy packages the command has imported when it ends."""
    program = (
        "import sys\n"
        "from adapters.cli import main\n"
        "try:\n"
        f"    main({[*arguments]})\n"
        "finally:\n"
        f"    print('imported', *sorted(sys.modules.keys() & {{*{HEAVY}}}), file=sys.stderr)\n"
    )
    root = Path(adapters.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=root)
    assert run.returncode == 0, run.stderr
    return set(run.stderr.split()[1:])


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), *((name, "--help") for name in main.commands)])
def test_help_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert imported(*arguments) == set()


def test_ctrl_c_while_torch_is_imported_is_no_traceback(tmp_path: Path) -> None:
    # A module of this name is found first. It says when it is imported, and then takes its time.
    (tmp_path / "torch.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    path = f"{tmp_path}:{Path(adapters.__file__).parents[1]}"
    running = installed("tree", "nothing", PYTHONPATH=path)
    assert running.stdout is not None and running.stderr is not None
    assert running.stdout.readline() == b"importing\n"
    running.send_signal(signal.SIGINT)
    assert (running.stderr.read(), running.wait()) == (b"Aborted!\n", 130)
