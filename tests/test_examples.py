"""The examples, run as a user would run them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_minilm(tmp_path: Path) -> None:
    program = [sys.executable, ROOT / "examples" / "minilm.py", tmp_path / "qa"]
    out = subprocess.run(program, check=True, capture_output=True, text=True, timeout=240).stdout
    first, last = map(float, re.search(r"loss ([\d.]+) -> ([\d.]+)", out).groups())
    assert last < first / 4
    assert "switched off, the base answers: True" in out
    assert "ejected, the base answers: True" in out
    assert "PEFT computes the same embeddings: True" in out
    assert (tmp_path / "qa" / "adapter_model.safetensors").is_file()
