"""The token goes to the Hub, and nowhere else; nobody is asked for one."""

from __future__ import annotations

import logging
import os
import pty
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
import torch

import weights
from tests.adapters.cli.files import contents, fluxion
from tests.weights import hub_server
from tests.weights.hub_server import Fault, HubServer

TOKEN = f"hf_{'Secret' * 6}"
FAULTS: list[Fault | None] = [None, 403, 404, 429, 500, "drop", "cut", "short"]


@pytest.mark.parametrize("fault", FAULTS)
def test_no_token_is_shown_or_kept(
    fault: Fault | None,
    hub: HubServer,
    style: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(hub_server, "WRITER", TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)
    hub.add("me/style", contents(style))
    hub.add("me/hidden", contents(style), private=True)
    base = weights.save({"0.weight": torch.ones(4, 4)}, tmp_path / "base.safetensors")
    hub.add("me/base", {"model.safetensors": base.read_bytes()})
    if fault is not None:
        hub.faults = dict.fromkeys(range(5000), fault)
    said = []
    for number, command in enumerate(
        [
            ["pull", "me/style"],
            ["pull", "me/hidden", tmp_path / "out"],
            ["push", style, "me/new", "--license", "mit"],
            ["push", style, "me/new", "--dry-run", "--json"],
            ["inspect", "me/style", "--json"],
            ["tree", "me/base", "--json"],
            ["diff", "me/style", style, "--json"],
            ["convert", "me/hidden", tmp_path / "converted"],
            ["merge", "me/base", tmp_path / "merged", "--adapter", "me/style", "--json"],
        ]
    ):
        result = fluxion(*command)
        assert result.exit_code in (0, 1, 2), (number, result.output)
        said.append(result.output + result.stderr)
        if result.exception is not None:
            said += traceback.format_exception(result.exception)
    try:
        weights.download("me/hidden", token=TOKEN)
    except weights.WeightsError as error:
        said += traceback.format_exception(error)
    assert any(token == TOKEN for _, _, token in hub.requests)
    assert TOKEN not in "".join(said)
    assert TOKEN not in caplog.text
    for path in tmp_path.rglob("*"):
        assert TOKEN not in str(path)
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


PROGRAM = """
import sys
from adapters.cli import main
for command in (["pull", "me/hidden"], ["pull", "me/gated"], ["push", sys.argv[1], "me/new"]):
    try:
        main(command)
    except SystemExit as ended:
        print(ended.code, file=sys.stderr)
"""


def test_nobody_is_asked_for_a_token(hub: HubServer, style: Path, tmp_path: Path) -> None:
    """At a terminal, where it could be asked for: what is typed there is still there when the commands have ended."""
    hub.add("me/hidden", contents(style), private=True)
    hub.add("me/gated", contents(style), gated=True)
    ours, theirs = pty.openpty()
    os.write(ours, b"typed\n")
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, style],
        stdin=theirs,
        capture_output=True,
        timeout=120,
        check=True,
        text=True,
        env={**kept, **settings, "HF_HUB_DISABLE_XET": "1"},
    )
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["1"] * 3
    assert all("hf auth login" in line for line in lines[::2])
    os.set_blocking(theirs, False)
    assert os.read(theirs, 100) == b"typed\n"
    os.close(ours)
    os.close(theirs)
