"""A format, a method's layout and a family are one new module each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import weights
import weights.families
import weights.formats
import weights.methods
from weights.discovery import stated
from weights.families import component_names, translate
from weights.families.core import family
from weights.families.core import translate as names
from weights.formats.common import key_ends, single_file
from weights.methods.core import lycoris, peft

CACHED = (
    *(
        weights.formats.formats,
        lycoris.lycoris_layouts,
        lycoris.layouts_with,
        peft.peft_layouts,
        family.families,
        family.component_names,
    ),
    *(names._index, key_ends._ends, key_ends._most_names, key_ends.biases, single_file._complete),
)
FORMAT = """
import torch
import weights
from weights.formats.common.format import Format, Match

def recognise(probe):
    return Match.sure_if("shout" in (probe.tensors or ()))

def read(probe):
    return weights.AdapterFile({"fc": weights.LayerWeights("full", {}, {"diff": probe.open()["shout"]})})

def write(adapter, path):
    weights.save({"shout": adapter.layers["fc"].tensors["diff"]}, path)

FORMAT = Format(recognise, read, write, methods={"full"}, aliases=("loud",))
"""
METHOD = """
from weights.methods.core.lycoris import LycorisLayout, read_as_is, write_as_is

LYCORIS = LycorisLayout("whisper", sets=(frozenset({"w1", "w2"}),), read=read_as_is, write=write_as_is)
"""
FAMILY = """
from weights.families.core.family import Family

FAMILY = Family(tables=({"parrot.{i}.qkv": ("bird.{i}.q", "bird.{i}.k")},), components={"parrot": ("bird",)})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of which the modules are those of all three packages too."""
    for package in (weights.formats, weights.methods, weights.families):
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    for cached in CACHED:
        cached.cache_clear()
    yield tmp_path
    monkeypatch.undo()
    for cached in CACHED:
        cached.cache_clear()


def test_a_format(folder: Path) -> None:
    (folder / "shouted.py").write_text(FORMAT)
    layer = weights.LayerWeights("full", {}, {"diff": torch.ones(3, 2)})
    path = weights.write_adapter(weights.AdapterFile({"fc": layer}), folder / "x.safetensors", "loud")
    assert weights.read_adapter(path).format == "shouted"
    assert "shouted" in weights.formats_of("full") and "shouted" not in weights.formats_of("lora")


def test_a_method(folder: Path) -> None:
    (folder / "whispered.py").write_text(METHOD)
    tensors = {f"lora_unet_fc.w{number}": torch.ones(3, 2) for number in (1, 2)}
    read = weights.read_adapter(weights.save(tensors, folder / "x.safetensors"))
    assert read.layers["unet.fc"].method == "whisper"
    weights.save({"lora_unet_fc.w1": torch.ones(3, 2)}, folder / "x.safetensors")
    with pytest.raises(weights.FileFormatError, match=r"`lora_unet_fc\.w1` has no `lora_unet_fc\.w2`"):
        weights.read_adapter(folder / "x.safetensors")


def test_a_family(folder: Path) -> None:
    (folder / "parrots.py").write_text(FAMILY)
    (parts,) = translate("parrot.3.qkv", flattened=False)
    assert [part.path for part in parts] == ["bird.3.q", "bird.3.k"]
    assert component_names("parrot") == ("bird",)


def test_a_constant_of_another_kind_is_an_error(folder: Path) -> None:
    (folder / "mistaken.py").write_text("FAMILY = {}")
    with pytest.raises(TypeError, match=r"weights\.families\.mistaken\.FAMILY has to be a Family"):
        stated("weights.families", "FAMILY", family.Family)
