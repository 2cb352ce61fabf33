from __future__ import annotations

from pathlib import Path

from tests.adapters.cli.files import contents, done, fluxion, refused, serve
from tests.weights.hub_server import File, HubServer


def test_into_a_folder(hub: HubServer, style: Path, tmp_path: Path) -> None:
    serve(hub, "someone/style-lora", style)
    copy = tmp_path / "new" / "copy"
    assert done("pull", "someone/style-lora", copy) == f"{copy}\n"
    assert contents(copy) == contents(style)
    (copy / "adapter_config.json").write_text("changed")
    (copy / "notes.txt").write_text("mine")
    done("pull", "someone/style-lora", copy)
    assert contents(copy) == contents(style) | {"notes.txt": b"mine"}


def test_into_the_cache(hub: HubServer, style: Path) -> None:
    serve(hub, "someone/style-lora", style)
    path = Path(done("pull", "someone/style-lora").rstrip("\n"))
    assert contents(path) == contents(style)


def test_one_file_a_folder_and_a_revision(hub: HubServer, tmp_path: Path) -> None:
    files = {"a/x.txt": b"x", "a/y.json": b"{}", "b/z.json": b"[]"}
    repo = hub.add("someone/several", files)
    first, _ = repo.commits[-1]
    repo.commit({"a/y.json": File(b'{"new": 1}', large=False)})
    done("pull", "someone/several:b/z.json", tmp_path / "one")
    assert contents(tmp_path / "one") == {"z.json": b"[]"}
    done("pull", "someone/several:a", tmp_path / "old", "--revision", first)
    assert contents(tmp_path / "old")["y.json"] == b"{}"


def test_no_pickle_comes(hub: HubServer, tmp_path: Path) -> None:
    hub.add("someone/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle", "deep/more.json": b"[]"})
    done("pull", "someone/old:pytorch_model.bin")
    done("pull", "someone/old", tmp_path / "out")
    assert contents(tmp_path / "out") == {"config.json": b"{}", "deep/more.json": b"[]"}


def test_a_damaged_file_changes_nothing(hub: HubServer, style: Path, tmp_path: Path) -> None:
    serve(hub, "someone/style-lora", style)
    large = hub.repos["someone/style-lora"].commits[-1][1]["adapter_model.safetensors"]
    hub.damaged.add(large.sha256)
    result = fluxion("pull", "someone/style-lora", tmp_path / "out")
    assert result.exit_code == 1
    assert "damaged" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_what_cannot_be(hub: HubServer, style: Path, tmp_path: Path) -> None:
    serve(hub, "someone/style-lora", style)
    assert "neither a local path nor a repository" in refused("pull", "someone/nothing", tmp_path / "out")
    assert "is not a repository id" in refused("pull", "/nothing/here", tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    assert "is a file" in refused("pull", "someone/style-lora", tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"
