from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

import weights
from adapters.cli.commands.tree import Module
from tests.adapters.cli.files import MINILM, document, done, fluxion, refused, serve
from tests.weights.hub_server import HubServer


def lines(*arguments: object) -> list[list[str]]:
    return [line.split() for line in done("tree", *arguments).splitlines()]


def sharded(folder: Path, tensors: dict[str, Tensor]) -> Path:
    """A folder with each tensor in a shard of its own."""
    places = {name: f"model-{number:05}-of-{len(tensors):05}.safetensors" for number, name in enumerate(tensors, 1)}
    for name, file in places.items():
        weights.save({name: tensors[name]}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    return folder


def test_a_checkpoint() -> None:
    shown = done("tree", MINILM)
    assert "104 tensors, 22,713,728 parameters (22,713,216 float32, 512 int64), 90.9 MB" in shown
    rows = [line.split() for line in shown.splitlines()]
    assert ["encoder.layer.0-5", "6", "×", "1,774,464"] in rows
    assert ["│", "└──", "self", "443,520"] in rows
    assert ["│", "├──", "query", "weight", "384×384,", "bias", "384", "147,840"] in rows
    assert ["embeddings", "position_ids", "1×512", "int64", "11,919,104"] in rows
    assert max(map(len, shown.splitlines()[2:])) <= 80


def test_depth() -> None:
    assert [row[0] for row in lines(MINILM, "--depth", 1)[5:]] == ["embeddings", "encoder.layer.0-5", "pooler.dense"]
    assert fluxion("tree", MINILM, "--depth", 0).exit_code == 2


def test_as_json() -> None:
    told = document("tree", MINILM)
    assert told["parameters"] == 22713728
    assert told["bytes"] == sum(tensor.nbytes for tensor in weights.open(MINILM).values())
    assert told["dtypes"] == {"float32": 22713216, "int64": 512}
    assert told["tensors"]["pooler.dense.weight"] == {"dtype": "float32", "shape": [384, 384]}
    assert set(told["tensors"]) == set(weights.open(MINILM))


def test_only_those_that_are_alike_are_one(tmp_path: Path) -> None:
    sizes = {0: 4, 1: 4, 2: 5, 4: 5, 9: 4, 10: 4}
    tensors = {f"layers.{number}.fc.weight": torch.zeros(size, 2) for number, size in sizes.items()}
    tensors |= {f"heads.{name}.weight": torch.zeros(3) for name in "ab"}
    tensors["layers.0.fc.extra"] = tensors["layers.1.fc.extra"] = torch.zeros(1, dtype=torch.float16)
    rows = lines(weights.save(tensors, tmp_path / "x.safetensors"))
    assert [row[-1] for row in rows if row[:1] in (["├──"], ["└──"])] == ["3", "3", "9", "10", "10", "8", "8"]
    assert ["├──", "0-1.fc"] not in [row[:2] for row in rows]
    assert ["├──", "0-1"] in [row[:2] for row in rows]
    assert ["└──", "9-10"] in [row[:2] for row in rows]
    assert ["│", "└──", "fc", "weight", "4×2,", "extra", "1", "float16", "9"] in rows


def test_many_tensors_of_a_module_are_two_a_line(tmp_path: Path) -> None:
    tensors = {f"a.{name}": torch.zeros(2) for name in ("qweight", "qzeros", "scales")} | {"b.c.weight": torch.zeros(1)}
    shown = done("tree", weights.save(tensors, tmp_path / "x.safetensors"))
    assert [line.split() for line in shown.splitlines()[5:7]] == [
        ["a", "qweight", "2,", "qzeros", "2", "6"],
        ["scales", "2"],
    ]


def test_names_of_any_depth_take_no_time(tmp_path: Path) -> None:
    path = weights.save({"a." * 50_000 + "weight": torch.zeros(1), "b": torch.zeros(2)}, tmp_path / "deep.safetensors")
    assert "2 tensors, 3 parameters" in done("tree", path)
    assert Module.of({}).parameters == 0


def test_shards_and_a_pipeline(tmp_path: Path) -> None:
    part = tmp_path / "pipe" / "unet"
    part.mkdir(parents=True)
    sharded(part, {"a.weight": torch.zeros(2, 3), "b.weight": torch.zeros(4)})
    assert document("tree", part)["parameters"] == 10
    text = tmp_path / "pipe" / "text_encoder"
    for variant, dtype in (("model.safetensors", torch.float32), ("model.fp16.safetensors", torch.float16)):
        weights.save({"c.weight": torch.zeros(5, dtype=dtype)}, text / variant)
    told = document("tree", tmp_path / "pipe")
    assert set(told["tensors"]) == {"unet.a.weight", "unet.b.weight", "text_encoder.c.weight"}
    assert told["dtypes"] == {"float32": 15}
    weights.save({"whole": torch.zeros(1)}, tmp_path / "pipe" / "all.safetensors")
    assert set(document("tree", tmp_path / "pipe")["tensors"]) == {"whole"}
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    assert document("tree", tmp_path / "pipe") == told


def test_on_the_hub_no_tensor_is_downloaded(hub: HubServer, tmp_path: Path) -> None:
    tensors = {f"{name}.weight": torch.zeros(300, 300) for name in "ab"}
    serve(hub, "someone/model", sharded(tmp_path, tensors))
    hub.add("someone/pipe", {f"unet/{path.name}": path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
    assert document("tree", "someone/model")["parameters"] == 180_000
    assert set(document("tree", "someone/pipe")["tensors"]) == {"unet.a.weight", "unet.b.weight"}
    cached = {path.suffix for path in (tmp_path / "hf").rglob("*") if path.is_symlink() or "snapshots" in path.parts}
    assert ".safetensors" not in cached


def test_what_is_none(tmp_path: Path, hub: HubServer) -> None:
    (tmp_path / "x").mkdir()
    assert "holds no safetensors file" in refused("tree", tmp_path / "x")
    assert "neither a local path nor a repository" in refused("tree", "someone/nothing")
    (tmp_path / "x.safetensors").write_bytes(b"PK\x03\x04 and so on")
    assert "zip" in refused("tree", tmp_path / "x.safetensors")
