from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

import adapters
import weights
from tests.adapters.cli.files import contents, document, done, refused
from tests.weights.hub_server import READER, WRITER, HubServer


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch, hub: HubServer) -> None:
    monkeypatch.setenv("HF_TOKEN", WRITER)


@pytest.fixture
def out(style: Path, tmp_path: Path) -> Path:
    return weights.write_adapter(weights.read_adapter(style), tmp_path / "out")


def published(hub: HubServer, name: str) -> dict[str, bytes]:
    files = hub.repos[name].commits[-1][1]
    return {path: file.content for path, file in files.items() if path != ".gitattributes"}


def test_a_folder(hub: HubServer, out: Path) -> None:
    assert done("push", out, "me/style", "--message", "First").startswith(f"{hub.url}/me/style/commit/")
    assert published(hub, "me/style") == contents(out)


def test_the_license_and_tags_come_into_the_card_that_is_there(hub: HubServer, out: Path) -> None:
    before = contents(out)
    done("push", out, "me/style", "--license", "mit", "--tag", "cats", "--tag", "lora")
    assert contents(out) == before
    files = published(hub, "me/style")
    card, old = ModelCard(files["README.md"].decode()), ModelCard(before["README.md"].decode())
    assert (card.data.license, card.data.tags) == ("mit", [*old.data.tags, "cats"])
    assert card.text.strip() == old.text.strip()
    assert {**files, "README.md": before["README.md"]} == before


def test_a_lone_file_gets_a_card(hub: HubServer, kohya: Path) -> None:
    beside = contents(kohya.parent)
    done("push", kohya, "me/kohya", "--license", "mit", "--tag", "cats", "--private")
    files = published(hub, "me/kohya")
    assert set(files) == {"kohya.safetensors", "README.md"}
    assert files["kohya.safetensors"] == kohya.read_bytes()
    assert 'adapters.load(model, "me/kohya")' in files["README.md"].decode()
    assert ModelCard(files["README.md"].decode()).data.license == "mit"
    assert hub.repos["me/kohya"].private
    assert contents(kohya.parent) == beside
    assert len(weights.read_adapter("me/kohya").layers) == 12


def test_a_file_of_peft_comes_with_its_settings(hub: HubServer, style: Path, tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(style / name, tmp_path)
    (tmp_path / "secret.txt").write_text("not for others")
    done("push", tmp_path / "adapter_model.safetensors", "me/style")
    assert set(published(hub, "me/style")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert len(weights.read_adapter("me/style").layers) == 12


def test_a_folder_without_a_card_gets_one(hub: HubServer, out: Path) -> None:
    (out / "README.md").unlink()
    done("push", out, "me/style")
    assert set(published(hub, "me/style")) == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    assert not (out / "README.md").exists()


def test_a_dry_run_sends_nothing(hub: HubServer, out: Path) -> None:
    assert "Would publish 3 files to me/style, main (a new repository):" in done("push", out, "me/style", "--dry-run")
    told = document("push", out, "me/style", "--dry-run")
    assert told["dry_run"] and told["plan"].startswith("Would publish 3 files")
    assert hub.repos == {}


def test_a_branch_a_pull_request_and_json(hub: HubServer, out: Path) -> None:
    told = document("push", out, "me/style")
    assert told == {**told, "repo_id": "me/style", "dry_run": False, "revision": None}
    assert told["url"].startswith(f"{hub.url}/me/style/commit/")
    done("push", out, "me/style", "--revision", "second")
    (out / "notes.txt").write_text("more")
    done("push", out, "me/style", "--create-pr")
    assert {"main", "second"} < set(hub.repos["me/style"].branches)
    assert "notes.txt" not in published(hub, "me/style")


def test_what_must_not_be_published(hub: HubServer, out: Path, style: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (out / "model.bin").write_bytes(b"pickle")
    assert "is a pickle" in refused("push", out, "me/style")
    (out / "model.bin").unlink()
    (out / "README.md").write_text("---\nlicense: [\n---\n")
    assert "sound YAML" in refused("push", out, "me/style", "--license", "mit")
    assert "no adapter in a known format" in refused("push", Path(adapters.__file__).parent, "me/style")
    assert "no such file or folder" in refused("push", out / "nothing", "me/style")
    monkeypatch.setenv("HF_TOKEN", READER)
    (out / "README.md").unlink()
    assert "token" in refused("push", out, "me/style")
    monkeypatch.delenv("HF_TOKEN")
    assert "hf auth login" in refused("push", style, "me/style")
    assert hub.commits_posted == 0


def test_no_link_of_the_folder_is_written_through(hub: HubServer, out: Path, tmp_path: Path) -> None:
    mine = (out / "README.md").rename(tmp_path / "mine.md")
    (out / "README.md").symlink_to(mine)
    before = mine.read_bytes()
    assert f"{out / 'README.md'} is a link" in refused("push", out, "me/style", "--license", "mit")
    assert mine.read_bytes() == before
    mine.unlink()
    assert f"{out / 'README.md'} is a link" in refused("push", out, "me/style")
    assert not mine.exists()


def test_a_copy_with_a_new_card_has_what_the_folder_has(hub: HubServer, out: Path) -> None:
    (out / "deep").mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "deep" / "more.txt").symlink_to(out / "notes.txt")
    (out / ".hidden").symlink_to("/nothing")
    (out / "README.md").chmod(0o400)
    os.mkfifo(out / "pipe")
    done("push", out, "me/style", "--license", "mit")
    files = published(hub, "me/style")
    assert files["deep/more.txt"] == files["notes.txt"] == b"mine"
    assert set(files) == set(contents(out))
