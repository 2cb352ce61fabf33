"""`read_adapter` and its options, whatever the format: pickles on request, finite numbers, a limit of size."""

from __future__ import annotations

import os
import re
import warnings
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import peft
import pytest
import torch
from torch import nn

import adapters
import weights
from tests.adapters.models import perturb


@pytest.fixture
def model() -> nn.Sequential:
    torch.default_generator.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


@pytest.fixture
def pickled(model: nn.Sequential, tmp_path: Path) -> Path:
    """A folder that PEFT wrote with a pickle."""
    settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "1"], init_lora_weights=False)
    with warnings.catch_warnings(action="ignore"):
        peft.get_peft_model(model, settings).save_pretrained(tmp_path / "old", safe_serialization=False)
    return tmp_path / "old"


def test_a_pickle_is_read_on_request_only(pickled: Path) -> None:
    with pytest.raises(weights.SourceNotFoundError, match=r"pass|pickle=True"):
        weights.read_adapter(pickled)
    theirs = torch.load(pickled / "adapter_model.bin", weights_only=True)
    for source in (pickled, pickled / "adapter_model.bin"):
        adapter = weights.read_adapter(source, pickle=True)
        assert adapter.layers["0"].hyperparameters["alpha"] == 3
        for name in ("lora_A", "lora_B"):
            assert torch.equal(adapter.layers["0"].tensors[name], theirs[f"base_model.model.0.{name}.weight"])
    # What is there as safetensors too goes first.
    weights.write_adapter(adapter, pickled)
    (pickled / "adapter_model.bin").write_bytes(b"no pickle")
    weights.read_adapter(pickled, pickle=True)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (lambda path: {"fc.lora_A.weight": Evil(path)}, "no pickle of tensors alone"),
        (lambda path: {"fc.lora_A.weight": 3}, "more than tensors by name"),
        (lambda path: [torch.ones(2)], "more than tensors by name"),
        (lambda path: {3: torch.ones(2)}, "more than tensors by name"),
        (None, "no pickle of tensors alone, or damaged"),
    ],
)
def test_a_pickle_of_anything_but_tensors_is_refused(tmp_path: Path, content: Any, match: str) -> None:
    path, touched = tmp_path / "adapter_model.bin", tmp_path / "touched"
    if content is None:
        path.write_bytes(b"\x80\x02}q\x00")
    else:
        torch.save(content(touched), path)
    for source in (path, tmp_path):
        with pytest.raises(weights.FileFormatError, match=match):
            weights.read_adapter(source, pickle=True)
    assert not touched.exists()


def test_a_small_pickle_of_much_is_refused(tmp_path: Path) -> None:
    path, packed = tmp_path / "adapter_model.bin", tmp_path / "packed.bin"
    torch.save({"fc.lora_A.weight": torch.zeros(1).expand(4, 10**12)}, path)
    with pytest.raises(weights.FileFormatError, match="is a small file of 16,000,000,000,000 bytes"):
        weights.read_adapter(path, pickle=True, max_bytes=1_000_000)
    torch.save({"fc.lora_A.weight": torch.zeros(4, 100_000)}, path)
    with ZipFile(path) as archive, ZipFile(packed, "w", ZIP_DEFLATED) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    with pytest.raises(weights.FileFormatError, match="is a small file of 1,60"):
        weights.read_adapter(packed, pickle=True, max_bytes=1_000_000)


def test_several_pickles_are_not_guessed_at(pickled: Path) -> None:
    (pickled / "adapter_model.pt").write_bytes(b"")
    with pytest.raises(weights.FileFormatError, match=r"several pickles \(adapter_model.bin, adapter_model.pt\)"):
        weights.read_adapter(pickled, pickle=True)


@pytest.mark.parametrize("format", ["fluxion", "peft"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_finite_numbers_on_request(model: nn.Sequential, tmp_path: Path, format: str, value: float) -> None:
    patch = adapters.inject(model, adapters.LoRA(rank=2))
    perturb(patch)
    path = patch.save_pretrained(tmp_path, format=format)
    assert weights.read_adapter(path, finite=True).layers.keys() == {"0", "1"}
    with torch.no_grad():
        patch.attachments[1].branch.lora_B.weight[1, 1] = value
    patch.save_pretrained(tmp_path, format=format)
    weights.read_adapter(path)
    with pytest.raises(weights.FileFormatError, match="NaN or infinity in lora_B of 1"):
        weights.read_adapter(path, finite=True)


def test_a_limit_of_size(model: nn.Sequential, tmp_path: Path) -> None:
    path = adapters.inject(model, adapters.LoRA(rank=2)).save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in path.iterdir())
    weights.read_adapter(path, max_bytes=size)
    with pytest.raises(weights.FileFormatError, match=f"has {size:,} bytes, and {size - 1:,} are allowed"):
        weights.read_adapter(path, max_bytes=size - 1)


def test_what_was_read_goes_into_models(model: nn.Sequential, pickled: Path) -> None:
    bare = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    adapter = weights.read_adapter(pickled, pickle=True)
    patch = adapters.load(bare, adapter)
    assert (patch.name, list(patch.targets)) == ("default", ["0", "1"])
    other = adapters.load(bare, adapter, name="again")
    with torch.no_grad():  # They share no memory, with each other or with what was read.
        for place in other.attachments:
            place.branch.lora_A.weight.zero_()
    assert all(place.branch.lora_A.weight.any() for place in patch.attachments)
    assert all(layer.tensors["lora_A"].any() for layer in adapter.layers.values())


@pytest.mark.parametrize(
    ("source", "name"),
    [("old", "old"), ("old/", "old"), ("old/adapter_model.safetensors", "adapter_model"), ("./old/.", "default")],
)
def test_a_patch_is_named_after_its_source(
    model: nn.Sequential, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str
) -> None:
    adapters.inject(model, adapters.LoRA(rank=2), name="x").save_pretrained(tmp_path / "old", format="peft")
    monkeypatch.chdir(tmp_path)
    assert adapters.load(model, source).name == name


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "model.safetensors.index.json"])
def test_a_pipe_is_no_file(model: nn.Sequential, tmp_path: Path, name: str) -> None:
    """Nobody ever writes to it, and opening it would wait for that."""
    adapters.inject(model, adapters.LoRA(rank=2)).save_pretrained(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    reading = weights.open if name.endswith("index.json") else weights.read_adapter
    for source in (tmp_path, tmp_path / name):
        with pytest.raises(weights.WeightsError, match=re.escape(name)):
            reading(source)
