"""The documentation: every block of every page runs, in order, in Python or as a command; and the site is built."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from adapters.methods import METHODS
from tests.adapters.cli.files import done
from tests.weights.conftest import hub, hub_home
from tests.weights.hub_server import WRITER, HubServer

__all__ = ["hub", "hub_home"]

DOCS = Path(__file__).parents[1] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INSTALLED = re.compile(r"pip (install|uninstall) |make |eval |_FLUXION_COMPLETE=|hf auth ")  # What other tests do.


def run_commands(text: str) -> None:
    """Run the lines of a block for a shell that begin with the command."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.startswith("fluxion "):
            done(*shlex.split(line, comments=True)[1:])
        else:
            assert not line or line.startswith("#") or INSTALLED.match(line), f"This line is not tried: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_blocks_run(page: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_TOKEN", WRITER)  # on a Hub of this machine
    names: dict[str, object] = {"__name__": page.stem}
    blocks = BLOCK.findall(page.read_text())
    assert blocks
    known = dict(METHODS)
    try:
        for language, block in blocks:
            if language == "python":
                exec(compile(block, page.name, "exec", dont_inherit=True), names)
            elif language == "sh":
                run_commands(block)
            else:
                assert language == "text", f"Nobody tries a block in {language or 'no language'}."
    finally:  # What a page registers is forgotten.
        METHODS.clear()
        METHODS.update(known)
