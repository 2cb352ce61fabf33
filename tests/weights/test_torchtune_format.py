"""torchtune's own adapters, with its names of layers."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
import weights
from tests.weights.test_hostile_adapters import CHANGES, VALUES, attempt

SETTINGS = {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"], "peft_type": "LORA"}
Q = {"layers.0.attn.q_proj.lora_a.weight": (2, 6), "layers.0.attn.q_proj.lora_b.weight": (9, 2)}
LENGTHS = {"layers.0.attn.q_proj.magnitude": (9,)}


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        attention = nn.ModuleDict({"q_proj": nn.Linear(6, 9), "output_proj": nn.Linear(9, 8)})
        self.tok_embeddings = nn.Embedding(8, 6)
        self.layers = nn.ModuleList([nn.ModuleDict({"attn": attention})])

    def forward(self, tokens: Tensor) -> Tensor:
        attention = self.layers[0]["attn"]
        return attention["output_proj"](attention["q_proj"](self.tok_embeddings(tokens)).tanh())


def folder(path: Path, shapes: dict[str, tuple[int, ...]], about: Any = SETTINGS, name: str = "adapter_model") -> Path:
    weights.save({key: torch.randn(shape) for key, shape in shapes.items()}, path / f"{name}.safetensors")
    if about is not None:
        (path / "adapter_config.json").write_text(json.dumps(about))
    return path


@pytest.mark.parametrize("name", ["adapter_model", "adapter_0"])
@pytest.mark.parametrize("dora", [False, True])
def test_it_is_read(tmp_path: Path, name: str, dora: bool) -> None:
    """Also under the name that a PEFT adapter has, beside the same settings."""
    folder(tmp_path, Q | (LENGTHS if dora else {}), {**SETTINGS, "base_model_name_or_path": "me/base"}, name)
    for path in (tmp_path, tmp_path / f"{name}.safetensors"):
        file = weights.read_adapter(path)
        assert file.base_model == "me/base"
        model, x = Decoder(), torch.randn(3, 6)
        adapters.load(model, path)
        layer, t = model.layers[0]["attn"]["q_proj"], {key.split(".")[4]: t for key, t in weights.open(path).items()}
        weight = layer.base.weight + 3 * t["lora_b"] @ t["lora_a"]
        if dora:
            weight = weight * (t["magnitude"] / weight.norm(dim=1))[:, None]
        torch.testing.assert_close(layer(x), x @ weight.T + layer.base.bias)


@pytest.mark.parametrize("form", ["peft", "fluxion"])
def test_it_is_written_in_other_formats(tmp_path: Path, form: str) -> None:
    file = weights.read_adapter(folder(tmp_path, Q | LENGTHS))
    other = weights.read_adapter(weights.write_adapter(file, tmp_path / "out", format=form))
    assert other.layers.keys() == file.layers.keys()
    for where, layer in file.layers.items():
        assert layer.method == other.layers[where].method
        assert all(torch.equal(tensor, other.layers[where].tensors[name]) for name, tensor in layer.tensors.items())


@pytest.mark.parametrize(
    ("shapes", "about", "said"),
    [
        (Q, None, r"r is None in the adapter_config\.json beside it; lora_alpha is None"),
        (Q, {"r": 2, "lora_alpha": "6"}, "lora_alpha is '6'"),
        (Q, {**SETTINGS, "r": 3}, "of rank 3, a shape mismatch"),
        (
            Q | {"layers.0.attn.k_proj.lora_a.weight": (2, 6)},
            SETTINGS,
            r"`layers\.0\.attn\.k_proj\.lora_a\.weight` has no `layers\.0\.attn\.k_proj\.lora_b\.weight`",
        ),
        (Q | {"layers.0.mlp.experts.lora_gate_a": (3, 6, 2)}, SETTINGS, "experts.lora_gate_a' is not expected"),
        (Q | {".lora_a.weight": (2, 6)}, SETTINGS, "the key '.lora_a.weight' is not expected"),
        (
            {key: (1, *shape) for key, shape in Q.items()},
            SETTINGS,
            r"lora_a \(1, 2, 6\) and lora_b \(1, 9, 2\) of rank 2, a shape mismatch",
        ),
    ],
)
def test_what_is_not_supported(tmp_path: Path, shapes: Any, about: Any, said: str) -> None:
    with pytest.raises(weights.FileFormatError, match=said):
        weights.read_adapter(folder(tmp_path, shapes, about))


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_typed_error_or_a_patch_that_runs(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = folder(Path(name), Q | (LENGTHS if data.draw(st.booleans()) else {}))
        tensors, about = dict(weights.open(path)), dict(SETTINGS)
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.sampled_from(sorted(tensors)))
            what = data.draw(st.sampled_from(["tensor", "drop", "rename", "setting", "setting"]))
            if what == "tensor":
                tensors[at] = data.draw(st.sampled_from(CHANGES))(tensors[at])
            elif what == "drop" and len(tensors) > 1:
                del tensors[at]
            elif what == "rename":
                tensors[f"{at}{data.draw(st.sampled_from(['x', '.magnitude', '.lora_a.weight']))}"] = tensors.pop(at)
            elif what == "setting":
                about[data.draw(st.sampled_from(sorted(SETTINGS)))] = data.draw(VALUES)
        weights.save(tensors, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(about))
        attempt(Decoder().eval(), path)
