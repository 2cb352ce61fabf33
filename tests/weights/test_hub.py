"""`weights.download` and `weights.publish` through the real client, against a Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import weights
from tests.weights.conftest import point_client_at
from tests.weights.hub_server import WRITER, File, HubServer, Repo
from weights.hub.download import Snapshot
from weights.hub.path import HubPath
from weights.tensors.folders import HubFolder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layer = weights.LayerWeights(
        "lora",
        {"rank": 2, "alpha": 4.0, "dropout": 0.0, "rslora": False},
        {"lora_A": torch.arange(6.0).reshape(2, 3), "lora_B": torch.ones(4, 2)},
    )
    return weights.write_adapter(weights.AdapterFile({"block.fc": layer}), tmp_path / "adapter")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def serve(hub: HubServer, folder: Path, name: str = "me/style", **settings: bool) -> Repo:
    return hub.add(name, contents(folder), **settings)


def test_what_is_published_comes_back_byte_for_byte(hub: HubServer, folder: Path) -> None:
    (folder / ".secret").write_text("not for others")
    url = weights.publish(folder, "me/style", token=WRITER)
    sha, files = hub.repos["me/style"].commits[-1]
    assert url == f"{hub.url}/me/style/commit/{sha}"
    assert hub.commits_posted == 1
    assert ".secret" not in files
    (folder / ".secret").unlink()
    assert contents(weights.download("me/style")) == contents(folder)
    assert contents(weights.download(f"me/style@{sha}")) == contents(folder)
    assert weights.read_adapter("me/style").layers["block.fc"].hyperparameters["rank"] == 2
    assert set(weights.open("me/style")) == set(weights.open(folder))


def test_one_pattern_is_no_row_of_letters(hub: HubServer) -> None:
    hub.add("someone/old", {"config.json": b"{}", "model.bin": b"pickle"})
    assert contents(weights.download("someone/old", allow_patterns="*.json")) == {"config.json": b"{}"}


def test_the_token_is_not_sent_to_where_large_files_are(hub: HubServer, folder: Path) -> None:
    serve(hub, folder, private=True)
    weights.download("me/style", token=WRITER)
    asked = {url: {token for at, _, token in hub.requests if at == url} for url in (hub.url, hub.cdn.url)}
    assert asked == {hub.url: {WRITER}, hub.cdn.url: {None}}


def test_publishing_again_what_is_there_makes_no_commit(hub: HubServer, folder: Path) -> None:
    first = weights.publish(folder, "me/style", token=WRITER)
    assert weights.publish(folder, "me/style", token=WRITER) == first
    assert hub.commits_posted == 1
    (folder / "notes.txt").write_text("more")
    assert weights.publish(folder, "me/style", token=WRITER) != first
    assert hub.repos["me/style"].commits[-1][1]["notes.txt"].content == b"more"


def test_a_change_by_somebody_else_is_not_overwritten(hub: HubServer, folder: Path) -> None:
    repo = serve(hub, folder)
    (folder / "README.md").write_text("mine")
    hub.before_commit = lambda repo: repo.commit({"README.md": File(b"theirs", large=False)}) and None
    with pytest.raises(weights.HubConflictError, match="changed by somebody else"):
        weights.publish(folder, "me/style", token=WRITER)
    assert repo.commits[-1][1]["README.md"].content == b"theirs"


def test_what_the_hub_did_not_keep_is_noticed(hub: HubServer, folder: Path) -> None:
    def spoil(repo: Repo) -> None:
        repo.commits[-1][1]["adapter_config.json"] = File(b"{}", large=False)

    hub.after_commit = spoil
    with pytest.raises(weights.HubError, match=r"does not have what was sent as adapter_config\.json"):
        weights.publish(folder, "me/style", token=WRITER)


def test_a_failed_upload_commits_nothing(hub: HubServer, folder: Path) -> None:
    hub.cdn_is_full = True  # the client wraps this refusal in a RuntimeError
    with pytest.raises(weights.HubError, match="the Hub answered 413"):
        weights.publish(folder, "me/style", token=WRITER)
    assert hub.commits_posted == 0


def test_a_public_repository_is_not_taken_for_a_private_one(hub: HubServer, folder: Path) -> None:
    repo = hub.add("me/style", {"README.md": b"old"})
    with pytest.raises(weights.HubError, match="exists and is public"):
        weights.publish(folder, "me/style", private=True, token=WRITER)
    assert len(repo.commits) == 1
    weights.publish(folder, "me/hidden", private=True, token=WRITER)
    assert hub.repos["me/hidden"].private


def test_publishing_needs_a_token_that_may_write(hub: HubServer, folder: Path) -> None:
    with pytest.raises(weights.HubAccessError, match="hf auth login"):
        weights.publish(folder, "me/style")
    assert hub.requests == []
    for repo in ("me/new", "me/style"):
        serve(hub, folder)
        with pytest.raises(weights.HubAccessError, match="token"):
            weights.publish(folder, repo, token="hf_reader")


@pytest.mark.parametrize("name", ["README.md", "adapter_config.json", "adapter_model.safetensors"])
def test_an_unsound_folder_is_not_published(hub: HubServer, folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"")
    with pytest.raises(weights.FileFormatError, match="empty"):
        weights.publish(folder, "me/style", token=WRITER)
    (folder / name).unlink()
    with pytest.raises(weights.SourceNotFoundError, match="lacks"):
        weights.publish(folder, "me/style", token=WRITER)
    assert hub.requests == []


def test_corrupt_tensors_are_not_published(hub: HubServer, folder: Path) -> None:
    (folder / "adapter_model.safetensors").write_bytes(b"PK\x03\x04 and so on, and so on")
    with pytest.raises(weights.FileFormatError, match="zip"):
        weights.publish(folder, "me/style", token=WRITER)
    assert hub.requests == []


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_file_is_refused_and_does_not_stay(hub: HubServer, folder: Path, name: str) -> None:
    repo = serve(hub, folder)
    file = repo.commits[-1][1][name]
    if file.large:
        hub.damaged.add(file.sha256)
    else:
        served, file.content = file.content, file.content.replace(b"LORA", b"LOHA")
        good = File(served, large=False)
        file.listing = good.listing  # type: ignore[method-assign]
    with pytest.raises(weights.HubError, match=f"{name} of me/style came damaged"):
        weights.download("me/style")
    hub.damaged.clear()
    if not file.large:
        file.content = served
    assert contents(weights.download("me/style")) == contents(folder)


def test_a_file_damaged_in_the_cache_is_noticed(hub: HubServer, folder: Path) -> None:
    serve(hub, folder)
    cached = weights.download("me/style") / "adapter_model.safetensors"
    cached.write_bytes(cached.read_bytes()[:-1] + b"\x01")
    with pytest.raises(weights.HubError, match="damaged"):
        weights.download("me/style")
    assert contents(weights.download("me/style")) == contents(folder)


def test_a_list_of_files_that_the_client_did_not_finish_does_not_stay(hub: HubServer, folder: Path) -> None:
    serve(hub, folder)
    lists = Path(constants.HF_HUB_CACHE) / "models--me--style" / "trees"
    lists.mkdir(parents=True)
    (lists / "tmpa1b2c3d4.tmp").touch()
    weights.download("me/style")
    assert [path.suffix for path in lists.iterdir()] == [".json"]


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("me/nothing", weights.HubAccessError, "neither a local path nor a repository"),
        ("me/gated", weights.HubAccessError, "accept its terms"),
        ("me/hidden", weights.HubAccessError, "hf auth login"),
        ("me/style@never", weights.HubError, "no such revision"),
        ("me/style@main/../..", weights.HubError, "me/style"),
        ("me/other", weights.HubError, "has no file like"),
        ("-bad-/..", weights.HubError, "is not a repository id"),
    ],
)
def test_what_the_hub_refuses_is_one_clear_error(
    hub: HubServer, folder: Path, name: str, error: type[Exception], match: str
) -> None:
    serve(hub, folder)
    serve(hub, folder, "me/gated", gated=True)
    serve(hub, folder, "me/hidden", private=True)
    hub.add("me/other", {"image.png": b"..."})
    with pytest.raises(error, match=match) as caught:
        weights.download(name)
    assert "\n" not in str(caught.value)


def test_no_secret_is_shown(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub, folder)
    snapshot = Snapshot.of(HubPath("me/style"), WRITER)
    assert WRITER not in repr(snapshot)
    assert WRITER not in repr(HubFolder(snapshot, ""))
    point_client_at("http://user:secret@127.0.0.1:9", monkeypatch)
    with pytest.raises(weights.HubConnectionError, match=r"at http://127\.0\.0\.1:9 cannot") as caught:
        weights.download("me/other")
    assert "secret" not in str(caught.value)


def test_a_hub_that_refuses_connections_fails_fast(
    hub_home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    point_client_at("http://127.0.0.1:9", monkeypatch)
    start = time.monotonic()
    for name in ("me/style", f"me/style@{'0' * 40}"):
        with pytest.raises(weights.HubConnectionError, match=r"127\.0\.0\.1:9 cannot be reached"):
            weights.download(name)
    with pytest.raises(weights.HubConnectionError, match="cannot be reached"):
        weights.publish(folder, "me/style", token=WRITER)
    assert time.monotonic() - start < 3


def test_what_is_cached_serves_without_the_hub(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(hub, folder)
    cached = weights.download("me/style")
    point_client_at("http://127.0.0.1:9", monkeypatch)
    assert weights.download("me/style") == cached
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert weights.download("me/style") == cached
    with pytest.raises(weights.HubConnectionError, match="HF_HUB_OFFLINE"):
        weights.download("me/unknown")


@pytest.mark.parametrize("quiet", ["0", "1"])
def test_the_environment_variables_users_set_are_enough(
    hub: HubServer, folder: Path, tmp_path: Path, quiet: str
) -> None:
    script = (
        "import json, sys, weights\n"
        "assert 'huggingface_hub' not in sys.modules\n"
        "weights.publish(sys.argv[1], 'me/style')\n"
        "print(json.dumps(sorted(path.name for path in weights.download('me/style').iterdir())))\n"
    )
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": WRITER}
    settings["HF_HUB_DISABLE_PROGRESS_BARS"] = quiet
    done = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        env={**os.environ, **settings, "HF_HUB_DISABLE_XET": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert json.loads(done.stdout) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert ("Fetching 3 files: 100%" in done.stderr) == (quiet == "0")
