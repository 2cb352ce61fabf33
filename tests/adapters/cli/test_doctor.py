"""`fluxion doctor`, in good health and with each complaint."""

from __future__ import annotations

import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from tests.adapters.cli.files import document, done, fluxion
from tests.processes import ROOT, installed
from tests.weights.conftest import point_client_at
from tests.weights.hub_server import READER, WRITER, HubServer


def problem(*options: object) -> str:
    """What is wrong, if it is one thing."""
    result = fluxion("doctor", *options, "--json")
    assert result.exit_code == 1
    (only,) = json.loads(result.stdout)["problems"]
    return only


def test_all_is_well(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)
    said = done("doctor")
    assert said.endswith("Nothing is wrong.\n")
    assert f"{hub.url}, reached" in said and WRITER not in said
    found = document("doctor")
    assert (found["ok"], found["problems"]) == (True, [])
    assert found["hub"] == {"endpoint": hub.url, "offline": False, "token": True, "reached": True, "user": "writer"}
    assert found["versions"]["torch"] == torch.__version__
    assert {"float32", "bfloat16"} <= set(found["devices"][0]["dtypes"])
    assert found["cache"]["folder"] == constants.HF_HUB_CACHE and not Path(constants.HF_HUB_CACHE).exists()


def test_without_a_token_only_the_hub_itself_is_asked(hub: HubServer) -> None:
    assert document("doctor")["hub"]["user"] is None
    assert "no token: public repositories can be read" in done("doctor")
    assert {request for _, request, _ in hub.requests} == {"HEAD /"}


def test_a_token_that_the_hub_refuses(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "answers 401 to the token: run `hf auth login`" in problem()
    assert "hf_wrong" not in fluxion("doctor").output


def test_a_token_that_no_request_can_carry_is_not_shown(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_sécret")
    assert problem()
    assert "cret" not in fluxion("doctor").output


def test_a_password_in_the_endpoint_is_not_shown(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    point_client_at(hub.url.replace("//", f"//me:{READER}@"), monkeypatch)
    assert READER not in fluxion("doctor").output


def test_offline_by_choice_nothing_is_asked(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "offline, by HF_HUB_OFFLINE" in done("doctor")
    assert hub.requests == []


def test_nobody_at_the_endpoint(hub_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    point_client_at(address, monkeypatch)
    assert f"{address} cannot be reached" in problem()


def test_a_hub_that_never_answers(hub_home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        settings = {"HF_ENDPOINT": address, "HF_HOME": str(hub_home), "HF_TOKEN": WRITER}
        out, error = (running := installed("doctor", "--timeout", 0.1, **settings)).communicate()
    assert (running.returncode, error) == (1, b"")
    assert f"Wrong: {address} has not answered in 0.1 seconds".encode() in out


def test_a_cache_that_cannot_be_written(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    assert "cannot be written, Not a directory: set HF_HOME" in problem()


def test_no_room(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=999_999_999))
    assert "left: make room, or set HF_HOME to a folder on another disk." in problem()


def with_distribution(folder: Path, name: str, version: str) -> Path:
    """A folder in which a distribution is installed, as far as Python can tell."""
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def test_what_is_too_old(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(with_distribution(tmp_path / "site", "safetensors", "0.1"))
    assert problem().endswith("pip install 'safetensors>=0.5'")


def test_a_torch_that_cannot_be_imported(hub_home: Path, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99: cannot open')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    out, error = installed("doctor", PYTHONPATH=path, HF_HUB_OFFLINE="1").communicate()
    assert error == b""
    assert b"torch cannot be imported, ImportError: libcudart.so.99: cannot open: install it again" in out
