"""The examples in each command's --help, and those of the README, run."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest

from adapters.cli import main
from tests.adapters.cli.files import done, fluxion, serve
from tests.processes import COMMAND, start
from tests.weights.hub_server import WRITER, HubServer

README = Path(__file__).parents[3] / "README.md"
COMMANDS = sorted({*main.commands} - {"demo"})


@pytest.fixture
def place(hub: HubServer, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the examples are about, and a Hub with the rest."""
    serve(hub, "someone/style-lora", small / "style")
    serve(hub, "someone/model", small / "model")
    serve(hub, "someone/tuned-model", small / "tuned")
    folder = tmp_path / "place"
    folder.mkdir()
    shutil.copy(small / "style.safetensors", folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_TOKEN", WRITER)
    return folder


def calls(text: str) -> list[list[str]]:
    """The arguments of each line that begins with the command."""
    return [shlex.split(line, comments=True)[1:] for line in text.splitlines() if line.strip().startswith("fluxion ")]


def examples(name: str) -> list[list[str]]:
    found = calls(re.split(r"Examples?:", done(name, "--help"))[1])
    assert {arguments[0] for arguments in found} == {name}
    return found


@pytest.mark.parametrize("name", COMMANDS)
def test_of_help(place: Path, name: str) -> None:
    for arguments in examples(name):
        assert fluxion(*arguments).exit_code == 0, arguments


def test_of_the_readme(place: Path) -> None:
    found = calls(README.read_text().split("## From the shell")[1].split("\n## ")[0])
    for arguments in found:
        assert fluxion(*arguments).exit_code == 0, arguments
    assert {arguments[0] for arguments in found} == {*COMMANDS}


# Those that other tests start as processes do so here only where everything is tried.
STARTED = {"convert", "doctor", "extract", "merge", "pull", "report", "tree"}
each = [pytest.param(name, marks=[pytest.mark.exhaustive] if name in STARTED else []) for name in COMMANDS]


@pytest.mark.parametrize("name", each)
def test_the_installed_command(place: Path, hub: HubServer, name: str) -> None:
    """The first example, by the command that an installation has, in a process of its own."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(place / "hf"), "HF_HUB_DISABLE_XET": "1"}
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    running = start(COMMAND, *examples(name)[0], settings=settings | quiet, cwd=place)
    said, wrong = running.communicate()
    assert (running.returncode, wrong) == (0, b"")
    assert said
