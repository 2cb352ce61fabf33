"""Downloads from olah, a server for the Hub's protocol that others wrote, of a git repository on this machine."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import close_session

import weights
from tests.weights.conftest import point_client_at
from tests.weights.test_hub import contents, folder

__all__ = ["folder"]  # a fixture

# In an environment of its own, which `make test` sets up: it needs other versions of the libraries used here.
OLAH = Path(sys.prefix) / "olah" / "bin" / "olah-cli"


@pytest.fixture
def repository(folder: Path, tmp_path: Path) -> Path:
    """The folder with an adapter, as a git repository where the server looks for one."""
    root = tmp_path / "mirror" / "models" / "me" / "style"
    root.parent.mkdir(parents=True)
    folder.rename(root)
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "--quiet", "-b", "main"], ["add", "."], [*who, "commit", "--quiet", "-m", "All"]):
        subprocess.run(["git", *command], cwd=root, check=True)
    return root


@pytest.fixture
def served(repository: Path, tmp_path: Path, hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = tmp_path / "olah.toml"
    settings.write_text(
        f'[basic]\nhost = "127.0.0.1"\nport = {port}\nrepos-path = "{tmp_path}/cache"\n'
        f'mirrors-path = ["{tmp_path}/mirror"]\n[accessibility]\noffline = true\n'
    )
    with (tmp_path / "olah.log").open("wb") as log:
        server = subprocess.Popen(
            [OLAH, "-c", settings, "--log-path", tmp_path / "logs"], stdout=log, stderr=log, cwd=tmp_path
        )
    try:
        _wait_for(port, server)
        point_client_at(f"http://127.0.0.1:{port}", monkeypatch)
        yield repository
    finally:
        close_session()
        server.terminate()
        server.wait(timeout=20)


def _wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError("olah does not answer.")


def test_it_serves_the_same_bytes(served: Path) -> None:
    sent = {path.name: path.read_bytes() for path in served.iterdir() if path.is_file()}
    assert contents(weights.download("me/style")) == sent
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=served, check=True, capture_output=True, text=True)
    assert contents(weights.download("me/style", revision=commit.stdout.strip())) == sent


def test_it_serves_the_same_tensors_lazily(served: Path) -> None:
    opened, expected = weights.open("me/style"), weights.open(served)
    assert opened.infos == expected.infos
    assert all(torch.equal(opened[name], tensor) for name, tensor in expected.items())
    assert weights.read_adapter("me/style").layers["block.fc"].hyperparameters["rank"] == 2


def test_what_it_does_not_have_is_one_clear_error(served: Path) -> None:
    with pytest.raises(weights.HubAccessError, match="me/other"):
        weights.download("me/other")
    with pytest.raises(weights.HubError, match="me/style"):
        weights.download("me/style@never")
