"""`weights.publish`: what it refuses, makes, sends and checks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import adapters
import weights
from tests.weights.conftest import point_client_at
from tests.weights.hub_server import WRITER, File, HubServer, Repo
from tests.weights.test_hub import contents, folder, serve

__all__ = ["folder"]  # a fixture


def files_of(repo: Repo, branch: str = "main") -> dict[str, bytes]:
    found = repo.at(branch)
    assert found is not None
    return {name: file.content for name, file in found[1].items() if name != ".gitattributes"}


def test_large_files_in_parts(hub: HubServer, folder: Path) -> None:
    hub.part_size = 64
    weights.publish(folder, "me/style", token=WRITER)
    assert files_of(hub.repos["me/style"]) == contents(folder)
    size = (folder / "adapter_model.safetensors").stat().st_size
    assert sum(request.startswith("PUT") for _, request, _ in hub.requests) == -(-size // 64)


def test_to_a_branch_that_is_new(hub: HubServer, folder: Path) -> None:
    repo = hub.add("me/style", {"old.txt": b"old"})
    weights.publish(folder, "me/style", revision="v2", token=WRITER)
    assert files_of(repo, "v2") == {"old.txt": b"old", **contents(folder)}
    assert files_of(repo) == {"old.txt": b"old"}
    (folder / "README.md").write_text("more")
    weights.publish(folder, "me/style", revision="v2", token=WRITER)
    assert files_of(repo, "v2")["README.md"] == b"more"
    assert weights.read_adapter("me/style@v2").layers.keys() == {"block.fc"}


def test_as_a_pull_request(hub: HubServer, folder: Path) -> None:
    repo = hub.add("me/style", {"old.txt": b"old"})
    weights.publish(folder, "me/style", create_pr=True, token=WRITER)
    assert files_of(repo) == {"old.txt": b"old"}
    assert files_of(repo, "refs/pr/1") == {"old.txt": b"old", **contents(folder)}
    with pytest.raises(weights.HubError, match="no such revision"):
        weights.publish(folder, "me/style", create_pr=True, revision="never", token=WRITER)
    assert "never" not in repo.branches


def test_what_was_made_before_it_failed_is_said(hub: HubServer, folder: Path) -> None:
    hub.cdn_is_full = True
    with pytest.raises(weights.HubError, match=r"413.*The new repository me/style was made before that, and stays"):
        weights.publish(folder, "me/style", token=WRITER)
    with pytest.raises(weights.HubError, match=r"413.*The new branch v2 was made before that, and stays"):
        weights.publish(folder, "me/style", revision="v2", token=WRITER)
    assert files_of(hub.repos["me/style"]) == {}


def test_a_dry_run_sends_nothing(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = weights.publish(folder, "me/style", dry_run=True)
    assert "3 files to me/style, main (a new repository)" in text
    assert all(f"{len(content):,} bytes" in text for content in contents(folder).values())
    assert (folder / "README.md").read_text() in text
    serve(hub, folder, private=True)
    assert "a new repository" in weights.publish(folder, "me/style", dry_run=True)
    assert "private, now at" in weights.publish(folder, "me/style", token=WRITER, dry_run=True)
    assert "v2 (a new branch)" in weights.publish(folder, "me/style", revision="v2", token=WRITER, dry_run=True)
    assert all(request.startswith("GET") for _, request, _ in hub.requests)
    assert hub.commits_posted == 0
    point_client_at("http://127.0.0.1:9", monkeypatch)
    assert "the Hub cannot be reached" in weights.publish(folder, "me/style", dry_run=True)
    (folder / "README.md").write_text("---\ntags: [a\n---\n")
    with pytest.raises(weights.FileFormatError, match=r"README\.md"):
        weights.publish(folder, "me/style", dry_run=True)


@pytest.mark.parametrize("name", ["a.bin", "b.pt", "c.pth", "d.pkl", "sub/e.CKPT"])
def test_a_pickle_is_not_published(hub: HubServer, folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    torch.save({}, folder / name)
    with pytest.raises(weights.FileFormatError, match="is a pickle"):
        weights.publish(folder, "me/style", token=WRITER)
    assert hub.requests == []


def test_what_a_link_outside_leads_to_is_not_published(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret")
    (folder / ".env").write_text("secret")
    link = folder / "notes.txt"
    for target in (tmp_path / "secret", tmp_path, folder / "nothing", folder / ".env"):
        link.symlink_to(target)
        with pytest.raises(weights.FileFormatError, match=r"notes\.txt is a link"):
            weights.publish(folder, "me/style", token=WRITER)
        link.unlink()
    assert hub.requests == []
    link.symlink_to("README.md")
    weights.publish(folder, "me/style", token=WRITER)
    assert files_of(hub.repos["me/style"])["notes.txt"] == (folder / "README.md").read_bytes()


def test_only_the_name_that_peft_knows_needs_its_settings(hub: HubServer, folder: Path) -> None:
    tensors = folder / "adapter_model.safetensors"
    shutil.copy(tensors, folder / "my_adapter_model.safetensors")
    weights.publish(folder, "me/style", token=WRITER)
    (folder / "deep").mkdir()
    shutil.copy(tensors, folder / "deep")
    with pytest.raises(weights.SourceNotFoundError, match=r"lacks deep/adapter_config\.json;"):
        weights.publish(folder, "me/style", token=WRITER)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (b"---\ntags: [a]\n\n# Title\n", "second line"),
        (b"---\ntags: [a\n---\n", "sound YAML"),
        (b"---\n- a\n---\n", "sound YAML"),
        (b"---\ntags: a\n---\n", "tags is a str; make it a list"),
        (b"---\ntags: [1]\n---\n", "tags is a list; make it a list of strings"),
        (b"---\nlicense: 2\n---\n", "license is a int"),
        (b"---\nbase_model: {a: b}\n---\n", "base_model is a dict"),
        (b"---\nlanguage: no\n---\n", "language is a bool; make it a string or a list"),
        (b"---\nlibrary_name: [a]\n---\n", "library_name is a list"),
        (b"\xff\xfe", "sound YAML"),
    ],
)
def test_a_card_that_the_hub_cannot_read_is_not_published(
    hub: HubServer, folder: Path, text: bytes, match: str
) -> None:
    (folder / "README.md").write_bytes(text)
    with pytest.raises(weights.FileFormatError, match=match):
        weights.publish(folder, "me/style", token=WRITER)
    assert hub.requests == []


@pytest.mark.parametrize("text", ["# Only a title", "---\nbase_model: [a/b, c/d]\nlicense: mit\nextra: {a: 1}\n---\n"])
def test_other_cards_are(hub: HubServer, folder: Path, text: str) -> None:
    (folder / "README.md").write_text(text)
    weights.publish(folder, "me/style", token=WRITER)
    assert files_of(hub.repos["me/style"])["README.md"] == text.encode()


def test_one_file_of_tensors_and_a_card_are_enough(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    adapter = weights.read_adapter(folder)
    weights.publish(weights.write_adapter(adapter, tmp_path / "own", "fluxion"), "me/own", token=WRITER)
    assert weights.read_adapter("me/own").layers.keys() == {"block.fc"}
    other = tmp_path / "other"
    other.mkdir()
    flattened = weights.AdapterFile({"lora_unet_fc": adapter.layers["block.fc"]}, flattened=True)
    weights.write_adapter(flattened, other / "style.safetensors", "lycoris")
    (other / "README.md").write_text("# Style")
    weights.publish(other, "me/other", token=WRITER)
    assert len(weights.read_adapter("me/other").layers) == 1


def test_another_header_than_was_sent_is_noticed(hub: HubServer, folder: Path) -> None:
    def spoil(repo: Repo) -> None:
        file = repo.commits[-1][1]["adapter_model.safetensors"]
        hub.large[file.sha256] = bytes([file.content[0] ^ 1]) + file.content[1:]

    hub.after_commit = spoil
    with pytest.raises(weights.HubError, match=r"does not have what was sent as adapter_model\.safetensors"):
        weights.publish(folder, "me/style", token=WRITER)


def test_a_name_that_not_every_system_allows_is_not_published(hub: HubServer, folder: Path) -> None:
    (folder / "a\\b").write_text("...")
    with pytest.raises(weights.FileFormatError, match="give it another"):
        weights.publish(folder, "me/style", token=WRITER)
    assert hub.requests == []


def test_a_token_that_is_none_is_not_repeated(hub: HubServer, folder: Path) -> None:
    for token in ("hf_secret\n", "hf secret", "hf_sécret"):
        with pytest.raises(weights.HubAccessError, match="token") as caught:
            weights.publish(folder, "me/style", token=token)
        assert "cret" not in str(caught.value)
    assert hub.requests == []


def test_what_is_there_already_is_checked_too(hub: HubServer, folder: Path) -> None:
    weights.publish(folder, "me/style", token=WRITER)
    repo = hub.repos["me/style"]
    config = json.loads(repo.commits[-1][1]["adapter_config.json"].content)
    repo.commit({"adapter_config.json": File(json.dumps(config | {"r": 9}).encode(), large=False)})
    weights.publish(folder, "me/style", token=WRITER)
    assert files_of(repo) == contents(folder)


def test_a_patch_is_published_with_a_card_of_its_own(hub: HubServer) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    patch = adapters.inject(model, adapters.LoRA(rank=2), targets="0")
    options = {"license": "mit", "tags": ["style"], "token": WRITER}
    text = patch.push_to_hub("me/style", dry_run=True, **options)
    assert hub.repos == {}
    patch.push_to_hub("me/style", private=True, commit_message="First", **options)
    repo = hub.repos["me/style"]
    assert repo.private
    card = files_of(repo)["README.md"].decode()
    assert text.endswith(card)
    assert 'PeftModel.from_pretrained(model, "me/style")' in card
    assert "license: mit" in card
    assert "- style" in card
    assert "0  lora rank 2" in card
