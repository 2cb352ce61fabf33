"""`weights.open` on the Hub: headers by ranges, files when a tensor of theirs is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import weights
from tests.weights.hub_server import WRITER, File, HubServer

BIG = 1 << 16  # numbers; their bytes are more than the first part that is fetched


@pytest.fixture
def shards(hub: HubServer, tmp_path: Path) -> dict[str, torch.Tensor]:
    """A model in two shards, the first with a long header, in a folder of a repository."""
    first = {f"layers.{n}.a_rather_long_name_of_a_weight": torch.full((1,), float(n)) for n in range(1500)}
    second = {"head.weight": torch.arange(float(BIG))}
    places = {name: f"model-0000{n}-of-00002.safetensors" for n, part in ((1, first), (2, second)) for name in part}
    contents = {"model.safetensors.index.json": json.dumps({"metadata": {"a": "b"}, "weight_map": places}).encode()}
    for n, part in ((1, first), (2, second)):
        path = weights.save(part, tmp_path / "part.safetensors")
        contents[f"model-0000{n}-of-00002.safetensors"] = path.read_bytes()
    hub.add("me/base", {f"unet/{name}": content for name, content in contents.items()} | {"unet/notes.txt": b"."})
    return {**first, **second}


def transferred(hub: HubServer) -> int:
    """How often a whole large file was fetched: each time the client asks first what it is."""
    return sum(request.startswith("HEAD") and ".safetensors" in request for _, request, _ in hub.requests)


def test_tensors_are_known_before_their_file_is_fetched(hub: HubServer, shards: dict[str, torch.Tensor]) -> None:
    opened = weights.open("me/base:unet", max_bytes=10**6)
    assert opened.metadata == {"a": "b"}
    assert {name: (info.dtype, info.shape) for name, info in opened.infos.items()} == {
        name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in shards.items()
    }
    before = len(hub.requests)
    assert "me/base:unet/model-00001-of-00002.safetensors" in repr(opened)
    assert transferred(hub) == 1  # the index
    assert torch.equal(opened["head.weight"], shards["head.weight"])
    assert transferred(hub) == 2
    assert len(hub.requests) > before
    assert all(torch.equal(opened[name], tensor) for name, tensor in shards.items())
    assert transferred(hub) == 3
    hub.requests.clear()
    again = weights.open("me/base:unet")
    assert all(torch.equal(again[name], tensor) for name, tensor in shards.items())
    assert transferred(hub) == 0


def test_one_file_of_it(hub: HubServer, shards: dict[str, torch.Tensor]) -> None:
    opened = weights.open("me/base:unet/model-00002-of-00002.safetensors")
    assert list(opened) == ["head.weight"]
    assert transferred(hub) == 0
    assert torch.equal(opened["head.weight"], shards["head.weight"])
    with pytest.raises(weights.SourceNotFoundError, match="me/base:vae holds no safetensors file"):
        weights.open("me/base:vae")
    with pytest.raises(weights.SourceNotFoundError, match="me/base holds no safetensors file"):
        weights.open("me/base")


def test_too_much_is_refused_before_anything_is_fetched(hub: HubServer, shards: dict[str, torch.Tensor]) -> None:
    size = sum(tensor.nbytes for tensor in shards.values())
    assert len(weights.open("me/base:unet", max_bytes=size)) == len(shards)
    with pytest.raises(weights.FileFormatError, match="max_bytes"):
        weights.open("me/base:unet", max_bytes=size - 1)
    assert transferred(hub) == 1  # the index


def test_a_header_other_than_that_of_the_file_is_noticed(
    hub: HubServer, shards: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    file = hub.repos["me/base"].commits[-1][1]["unet/model-00002-of-00002.safetensors"]
    right = hub.large[file.sha256]
    header = right.replace(b'"head.weight"', b'"HEAD.weight"')
    hub.large[file.sha256] = header
    opened = weights.open("me/base:unet/model-00002-of-00002.safetensors")
    hub.large[file.sha256] = right
    with pytest.raises(weights.HubError, match="another header"):
        opened["HEAD.weight"]


def test_what_is_no_tensor_file_is_refused_without_fetching_it(hub: HubServer) -> None:
    hub.add("me/zip", {"model.safetensors": b"PK\x03\x04" + bytes(BIG)})
    with pytest.raises(weights.FileFormatError, match=r"model\.safetensors of me/zip .* zip archive"):
        weights.open("me/zip")
    hub.add("me/long", {"model.safetensors": (30_000_000).to_bytes(8, "little") + b"{" + bytes(31_000_000)})
    with pytest.raises(weights.FileFormatError, match="too large a header"):
        weights.open("me/long")
    assert transferred(hub) == 0


def test_a_header_damaged_in_the_cache_does_not_stay(hub: HubServer, tmp_path: Path) -> None:
    hub.add(
        "me/base", {"model.safetensors": weights.save({"a": torch.ones(3)}, tmp_path / "t.safetensors").read_bytes()}
    )
    path = weights.download("me/base") / "model.safetensors"
    path.write_bytes(b"{}" + path.read_bytes()[2:])
    with pytest.raises(weights.HubError, match="damaged"):
        weights.open("me/base")
    assert torch.equal(weights.open("me/base")["a"], torch.ones(3))


def test_the_token_does_not_go_to_where_large_files_are(hub: HubServer, shards: dict[str, torch.Tensor]) -> None:
    hub.repos["me/base"].private = True
    with pytest.raises(weights.HubAccessError, match="hf auth login"):
        weights.open("me/base:unet")
    hub.requests.clear()
    assert len(weights.open("me/base:unet", token=WRITER)) == len(shards)
    asked = {url: {token for at, _, token in hub.requests if at == url} for url in (hub.url, hub.cdn.url)}
    assert asked == {hub.url: {WRITER}, hub.cdn.url: {None}}


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
)
def test_only_finite_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    path = weights.save(
        {"good": torch.ones(2).to(dtype), "bad": torch.tensor([1, float("nan")]).to(dtype), "number": torch.arange(3)},
        tmp_path / "t.safetensors",
    )
    assert len(dict(weights.open(path))) == 3
    opened = weights.open(path, finite=True)
    assert torch.equal(opened["number"], torch.arange(3))
    assert opened["good"].dtype == dtype
    with pytest.raises(weights.FileFormatError, match="'bad' has NaN or infinity"):
        opened["bad"]


def test_a_change_after_opening_changes_nothing(hub: HubServer, tmp_path: Path) -> None:
    old, new = (weights.save({"a": torch.full((3,), n)}, tmp_path / "t.safetensors").read_bytes() for n in (1.0, 2.0))
    repo = hub.add("me/base", {"model.safetensors": old})
    opened = weights.open("me/base")
    file = File(new, large=True)
    hub.large[file.sha256] = new
    repo.commit({"model.safetensors": file})
    assert torch.equal(opened["a"], torch.full((3,), 1.0))
    assert torch.equal(weights.open("me/base")["a"], torch.full((3,), 2.0))
