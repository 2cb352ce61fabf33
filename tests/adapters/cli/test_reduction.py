"""`extract`, `resize` and `combine`, on real files and on wrong ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import weights
from adapters.cli import main
from adapters.patch.combine import PRUNINGS
from tests.adapters.cli.files import MINILM, document, done, fluxion, refused


def test_extract_says_how_well_it_did(style: Path, tuned: Path, tmp_path: Path) -> None:
    printed = done("extract", MINILM, tuned, tmp_path / "lora", "--rank", 4)
    assert len(re.findall(r" 4 +0\.00 %", printed)) == 12
    assert printed.splitlines()[-1] == (
        f"{tmp_path / 'lora'}: 12 layers in peft format, of rank 4, relative error 0.00 % (root mean square)."
    )
    found, made = weights.read_adapter(style), weights.read_adapter(tmp_path / "lora")
    assert found.layers.keys() == made.layers.keys()
    assert made.base_model == str(MINILM)


def test_json(tuned: Path, tmp_path: Path) -> None:
    said = document("extract", MINILM, tuned, tmp_path / "lora", "--energy", 0.5)
    assert said["format"] == "peft"
    assert len(said["layers"]) == 12
    assert all(0 < layer["error"] ** 2 <= 0.5 and layer["rank"] in (1, 2) for layer in said["layers"])
    assert said["left_out"] == {}
    said = document("resize", tmp_path / "lora", tmp_path / "small.safetensors", "--rank", 1)
    assert {layer["rank"] for layer in said["layers"]} == {1}
    assert said["format"] == "fluxion"
    sources = [argument for path in ("lora", "small.safetensors=-0.5") for argument in ("--adapter", tmp_path / path)]
    said = document("combine", tmp_path / "both", *sources)
    assert said["adapters"][1] == {"source": str(tmp_path / "small.safetensors"), "weight": -0.5}


def test_what_is_left_out_is_listed(tmp_path: Path) -> None:
    base = {"a.weight": torch.randn(6, 4), "a.bias": torch.zeros(6)}
    weights.save(base, tmp_path / "base.safetensors")
    weights.save({name: tensor + 1 for name, tensor in base.items()}, tmp_path / "tuned.safetensors")
    printed = done(
        "extract", tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "o", "--rank", 1
    )
    assert re.search(r"not a 2-D weight +1 +a\.bias", printed)


def test_layers_are_chosen(tuned: Path, tmp_path: Path) -> None:
    options = ("--targets", "query", "--targets", "**.0.**", "--exclude", "1.attention.self.query")
    said = document("extract", MINILM, tuned, tmp_path / "lora", "--rank", 1, *options)
    names = {layer["path"].removeprefix("encoder.layer.") for layer in said["layers"]}
    assert names == {f"{n}.attention.self.query" for n in (0, 2, 3, 4, 5)} | {"0.attention.self.value"}
    assert len(said["left_out"]) == 6
    assert set(said["left_out"].values()) == {"excluded"}
    assert "'nowhere' matches no layer" in refused(
        "extract", MINILM, tuned, tmp_path / "o", "--rank", 1, "--targets", "nowhere"
    )


def test_wrong_ones_are_refused_in_one_line(style: Path, kohya: Path, tuned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "by rank" not in refused("extract", MINILM, MINILM, out, "--rank", 2)
    assert "no tensor of one name" in refused("extract", MINILM, style, out, "--rank", 2)
    assert "is there already" in refused("extract", MINILM, tuned, style, "--rank", 2)
    assert "give its base model" in refused("resize", kohya, out, "--rank", 1)
    assert "give its base model" in refused("combine", out, "--adapter", kohya)
    assert "keeps every rank" in refused("combine", out, "--adapter", style, "--rank", 1)
    assert "needs density=" in refused("combine", out, "--adapter", style, "--how", "ties")
    assert "cannot be reached" in refused("resize", "nothing/here", out, "--rank", 1)
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("extract", MINILM, MINILM, "out"),
        ("resize", "style", "out"),
        ("extract", MINILM, MINILM, "out", "--energy", 0),
        ("extract", MINILM, MINILM, "out", "--rank", 0),
        ("combine", "out"),
        ("combine", "out", "--adapter", "style=x"),
        ("combine", "out", "--adapter", "style", "--how", "mean"),
    ],
)
def test_wrong_calls_end_with_2(arguments: tuple[object, ...]) -> None:
    assert fluxion(*arguments).exit_code == 2


def test_the_ways_to_combine_are_those_there_are() -> None:
    (how,) = (option for option in main.commands["combine"].params if option.name == "how")
    assert set(how.type.choices) == {"exact", "svd", *PRUNINGS}
