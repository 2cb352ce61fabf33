"""The README: its quick start runs, and prints the tree it shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import adapters

ROOT = Path(__file__).parents[1]


def block(language: str) -> str:
    return re.search(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]


def test_quick_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(block("python"), names)
    assert capsys.readouterr().out == block("text")
    assert adapters.patches(names["model"]) == {"out": names["again"]}
    assert len([line for line in block("python").splitlines() if line and not line.startswith("import")]) <= 10
