from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import adapters
import weights
from tests.adapters.cli.files import MINILM, document, done, refused, serve, two_methods
from tests.weights.hub_server import HubServer


def test_a_file_of_peft(style: Path) -> None:
    told = document("inspect", style)
    assert (told["format"], told["base_model"], told["parameters"]) == ("peft", str(MINILM), 36864)
    assert (told["dtypes"], told["components"], told["flattened"]) == ({"float32": 36864}, [], False)
    assert len(told["layers"]) == 12
    layer = told["layers"]["encoder.layer.5.attention.self.query"]
    assert layer["method"] == "lora"
    assert (layer["hyperparameters"]["rank"], layer["hyperparameters"]["alpha"]) == (4, 8.0)
    assert layer["tensors"]["lora_A"] == {"dtype": "float32", "shape": [4, 384]}


def test_the_picture_of_it(style: Path) -> None:
    shown = done("inspect", style)
    assert "format      peft" in shown
    assert "36,864 (float32), 147.5 kB" in shown
    assert "rank 4, alpha 8, dropout 0, rslora no" in shown
    assert "encoder.layer.0-5.attention.self\n├── query  lora rank 4\n└── value  lora rank 4\n" in shown


def test_a_file_of_kohya_with_the_tags_it_was_trained_on(kohya: Path) -> None:
    shown = done("inspect", kohya)
    assert "format      lycoris" in shown
    assert "components  text_encoder" in shown
    assert "names       flattened" in shown
    assert "encoder_layer.0-5" in shown
    assert "ss_tag_frequency  cat (13), a dog (3)" in shown
    assert "\x1b" not in shown
    assert document("inspect", kohya)["metadata"]["ss_network_dim"] == "4"


def test_methods_and_ranks_that_differ(tmp_path: Path) -> None:
    shown = done("inspect", two_methods(tmp_path / "own"))
    assert "format      fluxion" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["lora", "2"] in [row[:2] for row in rows]
    assert ["norm", "2"] in [row[:2] for row in rows]
    assert "rank 2 to 3" in shown
    assert "dropout 0 to 0.1" in shown


def test_what_all_layers_share(tmp_path: Path) -> None:
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(8, 8), "b": torch.nn.Linear(8, 8)})
    path = adapters.inject(model, adapters.VeRA(rank=4)).save_pretrained(tmp_path / "vera")
    assert set(document("inspect", path)["shared"]) == set(weights.read_adapter(path).shared) != set()
    assert "vera_A  for all layers, 4×8 float32" in done("inspect", path)


def test_on_the_hub(hub: HubServer, style: Path, kohya: Path) -> None:
    serve(hub, "someone/style-lora", style)
    serve(hub, "someone/kohya", kohya)
    assert "someone/style-lora" in done("inspect", "someone/style-lora")
    assert document("inspect", "someone/kohya:kohya.safetensors")["format"] == "lycoris"


def test_a_file_that_says_absurd_things(tmp_path: Path) -> None:
    layers = {"a": {"method": "\x1b[2J", "hyperparameters": {"rank": 10**400, "alpha": math.nan, "more": {"x": [1]}}}}
    about = json.dumps({"version": 1, "base_model": "x\n" * 1000, "layers": layers})
    path = weights.save({"a/lora_A": torch.ones(1)}, tmp_path / "x.safetensors", {"fluxion_adapter": about})
    shown = done("inspect", path)
    assert "\x1b" not in shown
    assert "alpha nan" in shown
    numbers = document("inspect", path)["layers"]["a"]["hyperparameters"]
    assert numbers == {"rank": 10**400, "alpha": "nan", "more": {"x": [1]}}


@pytest.mark.parametrize("source", [MINILM, "nothing.safetensors"])
def test_what_is_no_adapter(source: object) -> None:
    assert str(source) in refused("inspect", source)


def test_a_file_that_is_damaged(kohya: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(kohya.read_bytes()[:-1])
    assert "cut.safetensors" in refused("inspect", path)
