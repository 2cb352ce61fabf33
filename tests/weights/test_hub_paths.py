"""What names a place on the Hub, and which files are fetched for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_hub_download

import weights
from tests.weights.hub_server import HubServer
from tests.weights.test_hub import contents, folder
from weights.hub.path import HubPath

__all__ = ["folder"]  # a fixture

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("source", "place"),
    [
        ("me/style", HubPath("me/style")),
        ("gpt2", HubPath("gpt2")),
        ("me/style@v1", HubPath("me/style", "v1")),
        ("me/style@refs/pr/1", HubPath("me/style", "refs/pr/1")),
        ("me/style:a/b.safetensors", HubPath("me/style", None, "a/b.safetensors")),
        ("me/style@v1:sub/", HubPath("me/style", "v1", "sub")),
        ("hf://me/style", HubPath("me/style")),
        ("hf://me/style@v1/sub/a.safetensors", HubPath("me/style", "v1", "sub/a.safetensors")),
        ("hf://me/style@refs/pr/3/a.safetensors", HubPath("me/style", "refs/pr/3", "a.safetensors")),
        ("https://huggingface.co/me/style", HubPath("me/style")),
        ("https://huggingface.co/me/style/tree/main", HubPath("me/style", "main")),
        ("https://huggingface.co/me/style/tree/main/sub", HubPath("me/style", "main", "sub")),
        ("https://huggingface.co/me/style/blob/a%2Fb/c%20d.json", HubPath("me/style", "a/b", "c d.json")),
        (
            f"https://huggingface.co/me/style/resolve/{COMMIT}/a.safetensors?download=true",
            HubPath("me/style", COMMIT, "a.safetensors"),
        ),
    ],
)
def test_every_form_names_one_place(source: str, place: HubPath) -> None:
    assert HubPath.parse(source) == place
    assert HubPath.parse(str(place)) == place


@pytest.mark.parametrize(
    "source",
    ["", "/me/style", "./style", "me/style/deep", "-me/style", "me/a.b:", "http://example.org/me/style", "a b"],
)
def test_what_has_no_such_form_names_nothing(source: str) -> None:
    assert HubPath.parse(source) is None


@pytest.mark.parametrize("part", ["../up", "/etc", "a//b", "a/./b", "a\\b", "a\0b", "..", "a/..", "a\nb"])
def test_what_could_lead_elsewhere_is_refused(part: str) -> None:
    for source in (f"me/style:{part}", f"me/style@{part}", f"hf://me/style/{part}"):
        with pytest.raises(weights.HubError, match="me/style"):
            HubPath.parse(source)


def test_pages_of_the_hub_that_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert HubPath.parse("http://127.0.0.1:9/me/style/blob/v1/a.json") == HubPath("me/style", "v1", "a.json")


def test_two_revisions_are_one_too_many() -> None:
    assert HubPath.parse("me/style@v1", "v1") == HubPath("me/style", "v1")
    with pytest.raises(weights.HubError, match="two revisions"):
        HubPath.parse("me/style@v1", "v2")


def test_a_path_on_this_machine_comes_first(
    hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "me").mkdir()
    folder.rename(tmp_path / "me" / "style")
    monkeypatch.chdir(tmp_path)
    assert "block.fc" in weights.read_adapter("me/style").layers
    assert hub.requests == []
    for missing in ("no/such/file", "x.safetensors", "a" * 5000, "a\0b"):
        with pytest.raises(weights.SourceNotFoundError, match="no such file or folder"):
            weights.read_adapter(missing)


def fetched(hub: HubServer) -> set[str]:
    """The files whose content has been asked for since the last time."""
    names = {request.rpartition("/")[2] for _, request, _ in hub.requests if request.startswith("HEAD")}
    hub.requests.clear()
    return names


def test_only_the_adapter_is_fetched(hub: HubServer, folder: Path) -> None:
    files = contents(folder)
    extra = dict.fromkeys(("model.safetensors", "optimizer.pt", "notes.txt"), b"...")
    hub.add("me/style", {**files, **extra, **{f"second/{name}": content for name, content in files.items()}})
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    for source, wanted in (
        ("me/style", adapter),
        ("me/style:second/adapter_model.safetensors", adapter),
        ("me/style:second", set()),  # which is there by now
    ):
        assert "block.fc" in weights.read_adapter(source).layers
        assert fetched(hub) == wanted


def kohya(folder: Path, path: Path) -> bytes:
    layers = {"lora_unet_fc": weights.read_adapter(folder).layers["block.fc"]}
    weights.write_adapter(weights.AdapterFile(layers, flattened=True), path, "lycoris")
    return path.read_bytes()


def test_the_only_file_that_may_be_an_adapter(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    content = kohya(folder, tmp_path / "style.safetensors")
    base = ("model.safetensors", "model-00001-of-00002.safetensors", "diffusion_pytorch_model.fp16.safetensors")
    hub.add("me/style", {"My style.safetensors": content, **dict.fromkeys(base, b"...")})
    assert list(weights.read_adapter("me/style").layers)
    assert fetched(hub) == {"My style.safetensors"}


def test_of_several_one_must_be_named(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    content = kohya(folder, tmp_path / "style.safetensors")
    hub.add("me/style", {"a.safetensors": content, "b.safetensors": content})
    with pytest.raises(weights.FileFormatError, match=r"me/style:a\.safetensors, me/style:b\.safetensors"):
        weights.read_adapter("me/style")
    assert fetched(hub) == set()
    assert list(weights.read_adapter("me/style:b.safetensors").layers)
    files = {f"{sub}/{name}": data for sub in ("one", "two") for name, data in contents(folder).items()}
    hub.add("me/many", files)
    with pytest.raises(weights.FileFormatError, match="me/many:one, me/many:two"):
        weights.read_adapter("me/many")
    hub.add("me/base", {"model.safetensors": b"..."})
    with pytest.raises(weights.FileFormatError, match="no adapter"):
        weights.read_adapter("me/base")
    with pytest.raises(weights.FileFormatError, match="me/base:nothing has no safetensors file"):
        weights.read_adapter("me/base:nothing")


def test_a_whole_commit_is_not_asked_for_again(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = hub.add("me/style", contents(folder))
    pinned = f"me/style@{repo.commits[-1][0]}"
    adapter = weights.read_adapter(pinned)
    hub.requests.clear()
    again = weights.read_adapter(pinned)
    tensors = weights.open(pinned)
    assert len(tensors) == 2
    for name, tensor in adapter.layers["block.fc"].tensors.items():
        assert torch.equal(again.layers["block.fc"].tensors[name], tensor)
    assert hub.requests == []
    # What is not there yet is still fetched, and where that fails, it fails at once.
    hub.faults = dict.fromkeys(range(1000), 503)
    with pytest.raises(weights.HubError, match="the Hub answered 503"):
        weights.download(pinned)
    assert len(hub.requests) == 1
    hub.faults = {}
    assert contents(weights.download(pinned)) == contents(folder)


def test_offline_the_cache_is_enough(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/style", contents(folder))
    weights.read_adapter("me/style")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert "block.fc" in weights.read_adapter("me/style").layers
    assert set(weights.open("me/style")) == set(weights.open(folder))
    assert hub.requests == []
    with pytest.raises(weights.HubConnectionError, match="HF_HUB_OFFLINE"):
        weights.download("me/style")  # The card has not been fetched.
    with pytest.raises(weights.HubConnectionError, match="HF_HUB_OFFLINE"):
        weights.open("me/other")


def test_a_cache_that_another_program_has_filled(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/style", contents(folder))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        hf_hub_download("me/style", name)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "block.fc" in weights.read_adapter("me/style").layers
    assert len(weights.open("me/style")) == 2


def test_a_cache_that_cannot_be_written(hub: HubServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("me/style", contents(folder))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "README.md" / "cache"))
    with pytest.raises(weights.FileWriteError, match="HF_HOME"):
        weights.download("me/style")


def test_what_is_no_commit_is_not_taken_for_a_folder(hub: HubServer, folder: Path) -> None:
    repo = hub.add("me/style", contents(folder))
    repo.commits[-1] = ("../../../escaped", repo.commits[-1][1])
    with pytest.raises(weights.HubError, match="what answered is no Hub"):
        weights.download("me/style")


def test_a_file_with_a_hostile_name_is_left_alone(hub: HubServer, folder: Path) -> None:
    hub.add("me/style", {**contents(folder), "../../escaped.json": b"{}", "a\\b.json": b"{}"})
    assert contents(weights.download("me/style")) == contents(folder)
