"""Places that are no good: names that lead nowhere, links in circles, devices, and files that say they have no end."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import weights
from weights.disk.atomic import settle

TENSORS = {"a": torch.ones(2)}
LAYER = weights.LayerWeights(
    "lora", {"rank": 1, "alpha": 1.0}, {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)}
)
WRITERS: dict[str, Callable[[Path], object]] = {
    "save": lambda path: weights.save(TENSORS, path),
    "write_adapter": lambda path: weights.write_adapter(weights.AdapterFile({"fc": LAYER}), path, "fluxion"),
    "rewrite": lambda path: weights.rewrite(path.parent / "ok" / "ok.safetensors", path, {}),
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    weights.save(TENSORS, tmp_path / "ok" / "ok.safetensors")
    return tmp_path


@pytest.mark.parametrize("name", ["a\0b.safetensors", "x" * 300 + ".safetensors", "loop.safetensors", "a\0b"])
@pytest.mark.parametrize("writer", WRITERS)
def test_names_that_lead_nowhere(writer: str, name: str, place: Path) -> None:
    (place / "loop.safetensors").symlink_to("loop.safetensors")
    before = sorted(place.rglob("*"))
    with pytest.raises(weights.FileWriteError, match="cannot be written"):
        WRITERS[writer](place / name)
    for read in (weights.open, weights.read_adapter):
        with pytest.raises(weights.WeightsError):
            read(place / name)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("writer", WRITERS)
def test_a_pipe_or_a_device_is_not_replaced(writer: str, place: Path) -> None:
    """Also not where a link leads to it, as one in a folder that somebody else has made may."""
    os.mkfifo(place / "pipe")
    (place / "link.safetensors").symlink_to("pipe")
    for target in (place / "link.safetensors", place / "link.safetensors"):
        with pytest.raises(weights.FileFormatError, match="a pipe or a device"):
            WRITERS[writer](target)
    assert stat.S_ISFIFO((place / "pipe").stat().st_mode)
    assert (place / "link.safetensors").is_symlink()


def test_links_in_circles(place: Path) -> None:
    (place / "ok" / "more").mkdir()
    (place / "ok" / "more" / "config.json").write_text("{}")
    for name in "abc":
        (place / "ok" / "more" / name).symlink_to(".")
    out = weights.rewrite(place / "ok", place / "out", {})
    assert sorted(path.name for path in out.rglob("*.*")) == ["config.json", "ok.safetensors"]


def test_a_tensor_without_end(place: Path) -> None:
    """A file of a terabyte that takes no room on the disk."""
    count = 2**46
    header = {"fc/lora_A": {"dtype": "F32", "shape": [2**20, 2**26], "data_offsets": [0, 4 * count]}}
    text = json.dumps({"__metadata__": {"fluxion_adapter": "{}"}, **header}).encode()
    path = place / "large.safetensors"
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        try:
            file.truncate(8 + len(text) + 4 * count)
        except OSError:
            pytest.skip("this disk has no files of that size")
    tensors = weights.open(path)
    with pytest.raises(weights.FileFormatError, match="for which there is no memory"):
        tensors["fc/lora_A"]
    with pytest.raises(weights.FileFormatError, match="for which there is no memory"):
        weights.rewrite(path, place / "out.safetensors", {"fc/lora_A": lambda tensor: tensor})
    with pytest.raises(weights.FileFormatError, match=r"bytes of tensors, and 1,000 are allowed"):
        weights.open(path, max_bytes=1_000)


@pytest.mark.parametrize(
    "journal",
    [
        {"0": "../out"},
        {"0": "/etc/out"},
        {"../../other": "ok.safetensors"},
        {"0": "link/out"},
        ["0"],
        {"..": "out"},
        {"0": "..", ".": "out"},
        "[" * 10_000,
        {"0": "a\0b"},
    ],
)
def test_a_journal_that_leads_elsewhere(journal: object, place: Path) -> None:
    """A folder that comes from somebody else may have one in it."""
    folder, other = place / "ok", place / "other"
    other.mkdir()
    (folder / "link").symlink_to("../other")
    stage = folder / ".0123456789abcdef.tmp"
    stage.mkdir()
    (stage / "0").write_text("theirs")
    (stage / "journal").write_text(journal if isinstance(journal, str) else json.dumps(journal))
    with pytest.raises(weights.FileWriteError, match="cannot be put in place"):
        settle(folder)
    assert [*other.iterdir()] == []
    assert not (place / "out").exists()


def test_what_was_left_half_done_is_ended(place: Path) -> None:
    stage = place / "ok" / ".0123456789abcdef.tmp"
    stage.mkdir()
    weights.save({"new": torch.zeros(1)}, stage / "1.safetensors")
    (stage / "journal").write_text(json.dumps({"0": "gone.txt", "1.safetensors": "ok.safetensors"}))
    assert [*weights.open(place / "ok")] == ["new"]
    assert [path.name for path in (place / "ok").iterdir()] == ["ok.safetensors"]
