"""Malformed files, some thousands of them each time: a typed error or an adapter, in bounded time and memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import adapters
import weights
from tests.thinned import exhaustive
from tests.weights.corpus import corpus
from tests.weights.fuzz import bounded, run


@pytest.mark.parametrize("count", [1000, exhaustive(30_000)])
def test_nothing_but_typed_errors_and_adapters(count: int) -> None:
    counts, faults = run(count)
    assert not faults, f"file {faults[0][0]} of seed 0: {faults[0][1]}"
    assert counts["FileFormatError"] > count // 2 and counts["read and loaded"] > count // 30
    assert counts["SourceNotFoundError"]


# What it has found


def test_settings_that_have_no_end(tmp_path: Path) -> None:
    path = corpus()["peft lora"].write(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_config.json").symlink_to("/dev/zero")
    with bounded(), pytest.raises(weights.FileFormatError, match="is a folder, a pipe or a device"):
        weights.read_adapter(path)
    (tmp_path / "adapter_config.json").unlink()
    with (tmp_path / "adapter_config.json").open("wb") as file:
        file.truncate(10**11)
    with bounded(), pytest.raises(weights.FileFormatError, match="has more than 50,000,000 bytes"):
        weights.read_adapter(path)


def test_an_index_that_has_no_end(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").symlink_to("/dev/zero")
    with bounded(), pytest.raises(weights.FileFormatError, match="is not an index of safetensors shards"):
        weights.open(tmp_path)


@pytest.mark.parametrize("tensors", [{}, {"bundle_emb.x.clip_l": torch.ones(2)}])
def test_settings_without_tensors(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path = weights.save(tensors, tmp_path / "file.safetensors", {"lora_adapter_metadata": ""})
    with pytest.raises(weights.FileFormatError, match="has no layers with an adapter in it"):
        weights.read_adapter(path)


def test_a_rotation_that_is_one_number(tmp_path: Path) -> None:
    tensors = {"lora_unet_x.oft_R.weight": torch.tensor(1.0)}
    with pytest.raises(weights.FileFormatError, match=r"an oft_R \(\), which is none of blocks"):
        weights.read_adapter(weights.save(tensors, tmp_path / "file.safetensors"))


def test_a_rotation_in_numbers_that_cannot_be_negated(tmp_path: Path) -> None:
    case = corpus()["comfyui oft of a convolution"]
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in case.tensors.items()}
    model = case.model()
    assert adapters.load(model, replace(case, tensors=tensors).write(tmp_path)).merge() is None


@pytest.mark.parametrize("target", ["../file.safetensors", "/etc/passwd", "a/b.safetensors", "..", ""])
def test_an_index_that_leads_out_of_its_folder(target: str, tmp_path: Path) -> None:
    case = corpus()["lycoris lora"]
    case.write(tmp_path)
    folder = tmp_path / "folder"
    folder.mkdir()
    index = {"weight_map": dict.fromkeys(case.tensors, target)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(weights.FileFormatError, match="which is not the name of a file beside it"):
        weights.open(folder)
