"""Publishing and downloading through Xet, with the real client and its own store in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

import weights
from tests.weights.hub_server import WRITER, File, HubServer
from tests.weights.test_hub import contents, folder

__all__ = ["folder"]  # a fixture


def test_there_and_back(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    hub.xet = tmp_path / "store"
    hub.xet.mkdir()
    sent = contents(folder)
    # A real Hub reads what it needs to know of a file in the store itself.
    large = File(sent["adapter_model.safetensors"], large=True)
    hub.large[large.sha256] = large.content
    weights.publish(folder, "me/style", token=WRITER)
    assert hub.commits_posted == 1
    asked = [request for _, request, _ in hub.requests]
    assert not any("lfs/objects" in request or request.startswith("PUT") for request in asked)
    assert any(path.is_file() for path in hub.xet.rglob("*"))
    hub.requests.clear()
    assert contents(weights.download("me/style")) == sent
    assert not any(url == hub.cdn.url for url, _, _ in hub.requests)
    assert any("xet-read-token" in request for _, request, _ in hub.requests)
