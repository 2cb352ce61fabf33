"""Shell completion, in a bash that thinks it is at a terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import adapters
from adapters.cli import main


class Bash:
    """An interactive bash, which is typed into."""

    def __init__(self, folder: Path) -> None:
        self.end, other = pty.openpty()
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        # Neither history, colours, nor a bell; a Tab shows what there is at once.
        (folder / "inputrc").write_text("set bell-style none\nset show-all-if-ambiguous on\nset page-completions off\n")
        environment = {
            "PATH": path,
            "PYTHONPATH": str(Path(adapters.__file__).parents[1]),
            "INPUTRC": str(folder / "inputrc"),
            "PS1": "> ",
            "TERM": "dumb",
            "COLUMNS": "200",
        }
        arguments = ["bash", "--norc", "--noprofile", "-i"]
        self.process = subprocess.Popen(
            arguments, stdin=other, stdout=other, stderr=other, env=environment, cwd=folder, start_new_session=True
        )
        os.close(other)

    def type(self, text: str, until: str) -> str:
        """Type, and read until something is there. Returns what was read."""
        os.write(self.end, text.encode())
        seen = ""
        while not re.search(until, seen):
            seen += os.read(self.end, 4096).decode(errors="replace")
        return seen

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)


@pytest.fixture
def bash(tmp_path: Path) -> Iterator[Bash]:
    (tmp_path / "some-style.safetensors").touch()
    shell = Bash(tmp_path)
    shell.type('eval "$(_FLUXION_COMPLETE=bash_source fluxion)"; echo re""ady\n', "ready")
    yield shell
    shell.close()


def test_commands_options_choices_and_paths(bash: Bash) -> None:
    assert bash.type("fluxion ins\t", "inspect ")
    assert bash.type("some-st\t", r"some-style\.safetensors ")
    assert bash.type("--js\t", "--json ")
    bash.type("\x15", "")  # the line is forgotten
    assert bash.type("fluxion convert some\t", r"some-style\.safetensors ")
    assert bash.type("out --to lyc\t", "lycoris ")
    bash.type("\x15", "")
    assert bash.type("fluxion merge some\t", r"some-style\.safetensors ")
    assert bash.type("out --adapter some\t", r"some-style\.safetensors ")


def test_all_commands_are_offered(bash: Bash) -> None:
    seen = bash.type("fluxion \t", "tree")
    assert all(re.search(rf"\b{name}\b", seen) for name in main.commands)
