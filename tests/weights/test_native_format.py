"""This library's own format: everything comes back, and what is not sound is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import weights
from weights import AdapterFile, FileFormatError, LayerWeights

LAYERS = {
    "a": LayerWeights("gate", {"rank": 2, "kind": "soft", "on": True, "alpha": None}, {"u": torch.randn(2, 3)}),
    "a.bias": LayerWeights("copy", {}, {"copy": torch.randn(4)}),
    "b.0.c": LayerWeights("gate", {"rank": 1}, {"u": torch.ones(1, 3), "v.bias": torch.arange(3)}),
}
ADAPTER = AdapterFile(LAYERS, base_model="someone/base", shared={"bank": torch.randn(5)})


def same(one: AdapterFile, other: AdapterFile) -> bool:
    tensors = [
        {
            **file.shared,
            **{f"{path}/{name}": t for path, layer in file.layers.items() for name, t in layer.tensors.items()},
        }
        for file in (one, other)
    ]
    about = [{path: (layer.method, layer.hyperparameters) for path, layer in f.layers.items()} for f in (one, other)]
    return (
        about[0] == about[1]
        and one.base_model == other.base_model
        and tensors[0].keys() == tensors[1].keys()
        and all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    )


@pytest.mark.parametrize("name", ["folder", "file.safetensors"])
def test_everything_comes_back(tmp_path: Path, name: str) -> None:
    path = weights.write_adapter(ADAPTER, tmp_path / name, format="fluxion")
    assert path == tmp_path / name
    assert same(weights.read_adapter(path), ADAPTER)
    again = weights.write_adapter(weights.read_adapter(path), tmp_path / f"again-{name}", format="fluxion")
    file, other = (one / "adapter.safetensors" if one.is_dir() else one for one in (path, again))
    assert file.read_bytes() == other.read_bytes()
    assert (path / "README.md").exists() == path.is_dir()
    assert not path.is_dir() or "PEFT" not in (path / "README.md").read_text()
    if path.is_dir():
        assert same(weights.read_adapter(path / "adapter.safetensors"), ADAPTER)


def test_two_formats_in_one_folder_are_not_guessed_at(tmp_path: Path) -> None:
    lora = LayerWeights("lora", {"rank": 1, "alpha": 1.0}, {"lora_A": torch.ones(1, 2), "lora_B": torch.ones(2, 1)})
    for format in ("peft", "fluxion"):
        weights.write_adapter(AdapterFile({"a": lora}), tmp_path, format=format)
    with pytest.raises(FileFormatError, match="in fluxion and in peft format; give the file you mean"):
        weights.read_adapter(tmp_path)
    assert weights.read_adapter(tmp_path / "adapter.safetensors").layers.keys() == {"a"}
    assert weights.read_adapter(tmp_path / "adapter_config.json").layers.keys() == {"a"}


GOOD = {"version": 1, "base_model": None, "layers": {"a": {"method": "gate", "hyperparameters": {}}}}


@pytest.mark.parametrize(
    ("about", "key", "match"),
    [
        (GOOD | {"version": 2}, "a/u", "is of version 2, this library reads 1: get a newer one"),
        (GOOD | {"base_model": 3}, "a/u", "version"),
        ({"version": 1}, "a/u", "does not say what adapter it is"),
        (GOOD | {"layers": {"a": {}}}, "a/u", "does not say what adapter it is"),
        (GOOD | {"layers": []}, "a/u", "does not say what adapter it is"),
        ([], "a/u", "does not say what adapter it is"),
        ("{", "a/u", "does not say what adapter it is"),
        ("[" * 100_000, "a/u", "does not say what adapter it is"),
        (GOOD, "b/u", "has a tensor 'b/u' of no layer"),
        (GOOD, "u", "has a tensor 'u' of no layer"),
    ],
)
def test_what_is_not_sound_is_refused(tmp_path: Path, about: Any, key: str, match: str) -> None:
    text = about if isinstance(about, str) else json.dumps(about)
    path = weights.save({key: torch.ones(1)}, tmp_path / "x.safetensors", {"fluxion_adapter": text})
    with pytest.raises(FileFormatError, match=match):
        weights.read_adapter(path)


def test_a_file_of_that_name_that_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "adapter.safetensors").write_bytes(b"no")
    with pytest.raises(FileFormatError):
        weights.read_adapter(tmp_path)


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="nothing to save"):
        weights.write_adapter(AdapterFile({}), tmp_path / "x", format="fluxion")
    bad: Any = {"rank": object()}
    with pytest.raises(FileFormatError, match="cannot be stored as JSON"):
        weights.write_adapter(AdapterFile({"a": LayerWeights("gate", bad, {})}), tmp_path / "x", format="fluxion")
    assert list(tmp_path.iterdir()) == []


def test_formats_of_a_method() -> None:
    assert weights.formats_of("lora")[:2] == ("fluxion", "peft")
    assert weights.formats_of("a method of your own") == ("fluxion",)


def test_a_file_without_layers_is_refused(tmp_path: Path) -> None:
    about = json.dumps({"version": 1, "base_model": None, "layers": {}})
    path = weights.save({}, tmp_path / "adapter.safetensors", {"fluxion_adapter": about})
    with pytest.raises(FileFormatError, match="has no layers in it"):
        weights.read_adapter(path)
