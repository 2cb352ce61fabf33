from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import weights
from tests.adapters.cli.files import MINILM, done, fluxion, refused, serve, with_value
from tests.weights.hub_server import HubServer

LAYER = "encoder.layer.3.attention.self.value"


def differences(a: object, b: object) -> list[dict[str, object]]:
    result = fluxion("diff", a, b, "--json")
    told = json.loads(result.stdout)
    assert result.exit_code == (0 if told["same"] else 1)
    assert told["same"] == (not told["differences"])
    return told["differences"]


def shown(a: object, b: object) -> str:
    result = fluxion("diff", a, b)
    assert (result.exit_code, result.stderr) == (1, "")
    return result.stdout


def test_the_same_in_another_format(style: Path, kohya: Path, tmp_path: Path) -> None:
    own = weights.write_adapter(weights.read_adapter(style), tmp_path / "own.safetensors", "fluxion")
    assert done("diff", style, own) == f"The same: the adapters {style} and {own}.\n"
    for a, b in ((style, kohya), (kohya, style), (own, kohya)):
        assert differences(a, b) == []


def test_one_number(style: Path, tmp_path: Path) -> None:
    other = with_value(style, tmp_path / "other", 0.5, LAYER)
    (one,) = differences(style, other)
    before = weights.read_adapter(style).layers[LAYER].tensors["lora_A"]
    assert (one["name"], one["what"]) == (f"{LAYER} lora_A", "values")
    assert one["largest"] == pytest.approx(0.5, rel=1e-5)
    assert one["relative"] == pytest.approx(0.5 / before.double().norm().item(), rel=1e-5)
    assert f"  {LAYER} lora_A" in shown(style, other)


def test_methods_hyperparameters_shapes_and_layers(tmp_path: Path) -> None:
    def layer(method: str, rank: int, alpha: float) -> weights.LayerWeights:
        tensors = {"lora_A": torch.ones(rank, 4), "lora_B": torch.ones(4, rank)}
        return weights.LayerWeights(method, {"rank": rank, "alpha": alpha}, tensors)

    a = {"x": layer("lora", 2, 4.0), "y": layer("lora", 2, 4.0), "z": layer("lora", 2, 4.0)}
    b = {"x": layer("lora", 3, 4.0), "y": layer("dora", 2, 4.0), "w.0": layer("lora", 2, 4.0)}
    for name, layers in (("a", a), ("b", b)):
        weights.write_adapter(weights.AdapterFile(layers), tmp_path / name, "fluxion")
    found = {(one["name"], one["what"]): (one["a"], one["b"]) for one in differences(tmp_path / "a", tmp_path / "b")}
    assert found == {
        ("z", "only in A"): ("lora", ""),
        ("w.0", "only in B"): ("", "lora"),
        ("x", "rank"): ("2", "3"),
        ("x lora_A", "shape"): ("2×4", "3×4"),
        ("x lora_B", "shape"): ("4×2", "4×3"),
        ("y", "method"): ("lora", "dora"),
    }
    text = shown(tmp_path / "a", tmp_path / "b")
    assert "rank: 2 → 3" in text
    assert "6 differences of the adapters" in text


def test_those_that_differ_in_numbers_only_are_one_line(style: Path, tmp_path: Path) -> None:
    done("convert", style, tmp_path / "half", "--dtype", "bfloat16")
    text = shown(style, tmp_path / "half")
    assert "type: float32 → bfloat16" in text
    assert "  encoder.layer.0-5.attention.self.query lora_A (×6)" in text
    assert "24 differences of the adapters" in text


def test_checkpoints(tmp_path: Path) -> None:
    tensors = dict(weights.open(MINILM))
    weights.save(tensors, tmp_path / "same.safetensors")
    assert differences(MINILM, tmp_path / "same.safetensors") == []
    changed = {**tensors, "pooler.dense.bias": tensors["pooler.dense.bias"].half(), "more": torch.ones(2)}
    del changed["pooler.dense.weight"]
    weights.save(changed, tmp_path / "changed.safetensors")
    found = {one["name"]: one["what"] for one in differences(MINILM, tmp_path / "changed.safetensors")}
    assert found == {"pooler.dense.weight": "only in A", "more": "only in B", "pooler.dense.bias": "type"}


def test_an_adapter_and_a_checkpoint(style: Path) -> None:
    assert {one["what"] for one in differences(style, MINILM)} == {"only in A", "only in B"}


def test_on_the_hub(hub: HubServer, small: Path) -> None:
    serve(hub, "someone/style-lora", small / "style")
    serve(hub, "someone/model", small / "model")
    assert differences("someone/style-lora", small / "style") == []
    assert differences("someone/model", small / "model") == []
    assert differences("someone/model", small / "tuned") != []


def test_code_2_where_there_is_nothing_to_compare(style: Path, tmp_path: Path) -> None:
    assert "no such file" in refused("diff", tmp_path / "x.safetensors", style, code=2)
    (tmp_path / "x.safetensors").write_bytes(b"{}")
    assert "not a safetensors file" in refused("diff", style, tmp_path / "x.safetensors", code=2)
    assert fluxion("diff", style).exit_code == 2


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [
        ([1.0, math.nan, math.inf], [1.0, math.nan, math.inf], (0.0, 0.0)),
        ([0.0], [-0.0], (0.0, 0.0)),
        ([3.0, 4.0], [3.0, 5.0], (1.0, 0.2)),
        ([1.0], [math.nan], (math.inf, math.inf)),
        ([math.inf], [-math.inf], (math.inf, math.inf)),
        ([0.0], [1.0], (1.0, math.inf)),
        ([], [], (0.0, 0.0)),
    ],
)
def test_distance(a: list[float], b: list[float], distance: tuple[float, float], tmp_path: Path) -> None:
    assert distance_of(torch.tensor(a), torch.tensor(b), tmp_path) == distance


def distance_of(a: torch.Tensor, b: torch.Tensor, folder: Path) -> tuple[float, float]:
    paths = [weights.save({"x": tensor}, folder / f"{name}.safetensors") for name, tensor in (("a", a), ("b", b))]
    found = differences(*paths)
    assert [one["what"] for one in found] == ["values"] * len(found)
    return (float(found[0]["largest"]), float(found[0]["relative"])) if found else (0.0, 0.0)


def test_distance_of_other_types(tmp_path: Path) -> None:
    assert distance_of(torch.tensor([2**60]), torch.tensor([2**60 + 1]), tmp_path)[0] == 1.0
    assert distance_of(torch.tensor([True]), torch.tensor([False]), tmp_path) == (1.0, 1.0)
    assert distance_of(torch.tensor([1 + 1j]), torch.tensor([1 + 2j]), tmp_path)[0] == 1.0
    one, two = (torch.tensor([number]).to(torch.float8_e4m3fn) for number in (1.0, 2.0))
    assert distance_of(one, two, tmp_path)[0] == 1.0
    assert distance_of(torch.tensor(2.0), torch.tensor(2.0), tmp_path) == (0.0, 0.0)


def test_a_pipeline_of_models_with_dots_in_their_names(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 2.0)):
        for part in ("unet.v2", "vae"):
            (tmp_path / name / part).mkdir(parents=True)
            content = {"conv.weight": torch.full((2,), value if part == "unet.v2" else 0.0)}
            weights.save(content, tmp_path / name / part / "model.safetensors")
    (one,) = differences(tmp_path / "a", tmp_path / "b")
    assert (one["name"], one["largest"]) == ("unet.v2.conv.weight", 1.0)


def test_a_name_with_the_sign_for_a_number(tmp_path: Path) -> None:
    for name in ("a", "b"):
        content = {key: torch.full((2,), float(name == "b")) for key in ("x.#.w", "x.0.w", "x.1.w")}
        weights.save(content, tmp_path / f"{name}.safetensors")
    lines = shown(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert "  x.#.w " in lines
    assert "  x.0-1.w (×2) " in lines


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint64])
def test_large_whole_numbers_that_differ_by_one(tmp_path: Path, dtype: torch.dtype) -> None:
    for number in (2**62, 2**62 + 1):
        weights.save({"x": torch.tensor([number], dtype=dtype)}, tmp_path / f"{number}.safetensors")
    (one,) = differences(*sorted(tmp_path.iterdir()))
    assert (one["what"], one["largest"]) == ("values", 1.0)
