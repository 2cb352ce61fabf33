"""The documentation: every Python block of every page runs, in order."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from adapters.methods import METHODS

PAGES = sorted((Path(__file__).parents[1] / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": page.stem}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    known = dict(METHODS)
    try:
        for block in blocks:
            exec(compile(block, page.name, "exec", dont_inherit=True), names)
    finally:  # What a page registers is forgotten.
        METHODS.clear()
        METHODS.update(known)
