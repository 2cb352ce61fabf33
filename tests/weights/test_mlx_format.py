"""The format of mlx-lm: factors the other way round, one scale and one rank for all layers."""

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
from adapters import DoRA, LoRA
from tests.adapters.models import perturb, snapshot
from tests.weights.test_hostile_adapters import CHANGES, VALUES, attempt, bounded


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 6)
        self.layers = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6)})])
        self.lm_head = nn.Linear(6, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = x + layer["down"](layer["up"](x).tanh())
        return self.lm_head(x)


X = torch.arange(8).view(2, 4)
PARAMETERS = {"rank": 2, "scale": 5.0, "dropout": 0.1}
UP = {"layers.0.up.lora_a": (6, 2), "layers.0.up.lora_b": (2, 9)}


def net() -> Net:
    torch.default_generator.manual_seed(0)
    return Net().double()


def folder(path: Path, shapes: dict[str, tuple[int, ...]], **settings: Any) -> Path:
    """As `mlx_lm.lora` leaves it, with what else it was told in the settings."""
    weights.save({key: torch.randn(shape).double() for key, shape in shapes.items()}, path / "adapters.safetensors")
    about = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": PARAMETERS, "model": "me/base", "iters": 9}
    (path / "adapter_config.json").write_text(json.dumps({**about, **settings}))
    return path


def only(path: Path) -> weights.LayerWeights:
    (layer,) = weights.read_adapter(path).layers.values()
    return layer


# Reading


@pytest.mark.parametrize("name", ["", "adapters.safetensors", "adapter_config.json"])
def test_the_scale_is_what_the_product_is_multiplied_by(tmp_path: Path, name: str) -> None:
    path = folder(tmp_path, UP) / name
    file = weights.read_adapter(path)
    assert file.base_model == "me/base"
    assert dict(only(path).hyperparameters) == {"rank": 2, "alpha": 10.0, "dropout": 0.1, "rslora": False}
    t = weights.open(tmp_path)
    model = net()
    adapters.load(model, path)
    x = torch.randn(3, 6).double()
    layer = model.layers[0]["up"]
    expected = layer.base(x) + 5 * x @ t["layers.0.up.lora_a"] @ t["layers.0.up.lora_b"]
    torch.testing.assert_close(layer.eval()(x), expected)


def test_a_checkpoint_of_the_training(tmp_path: Path) -> None:
    folder(tmp_path, UP)
    checkpoint = tmp_path / "0000100_adapters.safetensors"
    weights.save({key: t + 1 for key, t in weights.open(tmp_path).items()}, checkpoint)
    a = {name: only(tmp_path / name).tensors["lora_A"] for name in ("", checkpoint.name, "adapters.safetensors")}
    assert torch.equal(a[checkpoint.name], a[""] + 1) and torch.equal(a[""], a["adapters.safetensors"])


def test_embeddings_and_dora(tmp_path: Path) -> None:
    path = folder(tmp_path, {"embed_tokens.lora_a": (8, 2), "embed_tokens.lora_b": (2, 6)})
    model, t = net(), weights.open(tmp_path)
    adapters.load(model, path)
    delta = 5 * t["embed_tokens.lora_a"] @ t["embed_tokens.lora_b"]
    torch.testing.assert_close(model.embed_tokens(X), (model.embed_tokens.base.weight + delta)[X])
    path = folder(tmp_path, {**UP, "layers.0.up.m": (9,)}, fine_tune_type="dora")
    model, t, x = net(), weights.open(tmp_path), torch.randn(3, 6).double()
    adapters.load(model, path)
    layer = model.layers[0]["up"].eval()
    turned = layer.base.weight + 5 * (t["layers.0.up.lora_a"] @ t["layers.0.up.lora_b"]).T
    weight = turned * (t["layers.0.up.m"] / turned.norm(dim=1))[:, None]
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base.bias)


def test_the_metadata_that_mlx_writes(tmp_path: Path) -> None:
    """`null`, where there is none."""
    path = folder(tmp_path, UP) / "adapters.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + length].replace(b"{", b'{"__metadata__":null,', 1)
    path.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])
    assert weights.read_adapter(tmp_path).metadata == {}


def test_an_alpha_counts_in_the_oldest_files_only(tmp_path: Path) -> None:
    old = {"lora_parameters": {**PARAMETERS, "alpha": 16.0, "keys": ["up"]}}
    assert only(folder(tmp_path, UP, lora_layers=4, **old)).hyperparameters["alpha"] == 2 * 5.0 * 16 / 2
    with pytest.raises(weights.FileFormatError, match="has an alpha, which some versions heed and others do not"):
        weights.read_adapter(folder(tmp_path, UP, **old))
    same = {"lora_parameters": {**PARAMETERS, "alpha": 2}}
    assert only(folder(tmp_path, UP, **same)).hyperparameters["alpha"] == 10.0


@pytest.mark.parametrize(
    ("shapes", "settings", "said"),
    [
        (UP, {"fine_tune_type": "full"}, "fine_tune_type is 'full', which is none of lora and dora"),
        (UP, {"fine_tune_type": "dora"}, r"`layers\.0\.up\.lora_a` has no `layers\.0\.up\.m`"),
        (UP, {"lora_parameters": {"rank": 3, "scale": 1.0}}, "of rank 3, a shape mismatch"),
        (UP, {"lora_parameters": {"rank": 2}}, "its scale is None"),
        (UP, {"lora_parameters": {"rank": 10**400, "scale": 1.0}}, "its rank is 1000"),
        (UP, {"lora_parameters": {"rank": 2, "scale": 10**400}}, "its scale is 1000"),
        (UP, {"lora_parameters": [2]}, "its rank is None"),
        ({}, {}, "it has no adapter in it"),
        ({"layers.0.up.weight": (9, 6)}, {}, "the key 'layers.0.up.weight' is not expected"),
        ({"layers.0.up.lora_a": (6, 2)}, {}, r"`layers\.0\.up\.lora_a` has no `layers\.0\.up\.lora_b`"),
        ({"up.lora_a": (3, 2, 6), "up.lora_b": (3, 9, 2)}, {}, "adapters of several experts"),
        (
            {"embed.lora_a": (8, 2), "embed.lora_b": (2, 6), "embed.m": (8,)},
            {"fine_tune_type": "dora"},
            "a DoRA of an embedding with a length for each row",
        ),
    ],
)
def test_what_is_not_supported(tmp_path: Path, shapes: Any, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(weights.FileFormatError, match=said):
        weights.read_adapter(folder(tmp_path, shapes, **settings))


# Writing


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    for method in (LoRA(rank=2, alpha=3), LoRA(rank=3, alpha=4, rslora=True), LoRA(rank=2, alpha=0), DoRA(rank=2)):
        model = net()
        patch = adapters.inject(model, method, exclude=["embed_tokens"] * isinstance(method, DoRA))
        perturb(patch)
        path = patch.save_pretrained(tmp_path / f"{method}", format="mlx")
        other = net()
        loaded = adapters.load(other, path)
        assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in patch.state_dict().items())
        torch.testing.assert_close(other(X), model(X))
        # And through PEFT's format.
        third = net()
        adapters.load(third, loaded.save_pretrained(tmp_path / f"peft {method}", format="peft"))
        torch.testing.assert_close(third(X), model(X))


def test_the_settings(tmp_path: Path) -> None:
    model = net()
    patch = adapters.inject(model, LoRA(rank=2, alpha=6, dropout=0.1), targets=["up", "lm_head"])
    path = patch.save_pretrained(tmp_path, format="mlx")
    parameters = {"rank": 2, "scale": 3.0, "dropout": 0.1, "keys": ["layers.0.up", "lm_head"]}
    about = {"fine_tune_type": "lora", "num_layers": 0, "lora_parameters": parameters}
    assert json.loads((path / "adapter_config.json").read_text()) == about
    file = weights.open(path / "adapters.safetensors")
    assert file.metadata == {"format": "mlx"}
    assert {key: tuple(t.shape) for key, t in file.items() if "up" in key} == UP
    assert (path / "README.md").is_file()
    first = [file.read_bytes() for file in sorted(path.iterdir())]
    patch.save_pretrained(tmp_path, format="mlx")
    assert [file.read_bytes() for file in sorted(path.iterdir())] == first


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ranks_and_strengths_that_differ(tmp_path: Path, dtype: torch.dtype) -> None:
    methods = {
        "up": LoRA(rank=4, alpha=8),
        "down": LoRA(rank=2, alpha=7),
        "lm_head": LoRA(rank=3, alpha=2, rslora=True),
        "embed_tokens": LoRA(rank=2, alpha=4),
    }
    model = net().to(dtype)
    patch = adapters.inject(model, methods)
    perturb(patch)
    path = patch.save_pretrained(tmp_path, format="mlx")
    parameters = json.loads((path / "adapter_config.json").read_text())["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (4, 2.0)
    layers = weights.read_adapter(path).layers
    own = weights.read_adapter(patch.save_pretrained(tmp_path / "own", format="fluxion")).layers
    for where, layer in layers.items():
        (a, b), (c, d) = ([t.double() for _, t in sorted(one.tensors.items())] for one in (layer, own[where]))
        expected = methods[where.rpartition(".")[2]].scaling * d @ c
        torch.testing.assert_close(2.0 * b @ a, expected, rtol=1e-6, atol=1e-7)
    assert layers["layers.0.up"].tensors["lora_B"].dtype == dtype
    other = net().to(dtype)
    adapters.load(other, path)
    if dtype == torch.float64:
        torch.testing.assert_close(other(X), model(X))


@pytest.mark.parametrize(
    ("method", "targets", "said"),
    [
        ({"up": LoRA(rank=2), "down": DoRA(rank=2)}, None, "differ in method"),
        ({"up": LoRA(rank=2), "down": LoRA(rank=2, dropout=0.5)}, None, "differ in dropout"),
        (LoRA(rank=2, bias=True), "up", "more than mlx-lm knows"),
        (DoRA(rank=2), "embed_tokens", "a length for each feature"),
        (adapters.LoHa(rank=2), "up", "the method 'loha', which is none of lora and dora"),
        (LoRA(rank=2), "conv", "linear layers and embeddings only"),
        (LoRA(rank=2), "table", "not be known whether it is an embedding"),
        (LoRA(rank=2), "embedder", "not be known whether it is an embedding"),
    ],
)
def test_what_it_has_no_place_for(tmp_path: Path, method: Any, targets: Any, said: str) -> None:
    model = net()
    model.conv, model.table, model.embedder = nn.Conv1d(6, 6, 3), nn.Embedding(8, 6), nn.Linear(6, 6)
    patch = adapters.inject(model, method, targets)
    before = snapshot(model)
    with pytest.raises(weights.FileFormatError, match=said):
        patch.save_pretrained(tmp_path / "out", format="mlx")
    assert not (tmp_path / "out").exists() and snapshot(model) == before


def test_files_that_are_not_of_one_model(tmp_path: Path) -> None:
    layer = only(folder(tmp_path, UP))
    for file, said in (
        (weights.AdapterFile({}), "it has no layers"),
        (weights.AdapterFile({"a_up": layer}, flattened=True), "flattened"),
        (weights.AdapterFile({"a.up": layer, "b.up": layer}, components=("a", "b")), "for several models, a, b"),
        (weights.AdapterFile({"up": layer}, shared={"bank": torch.ones(2)}), "no place for bank"),
    ):
        with pytest.raises(weights.FileFormatError, match=said):
            weights.write_adapter(file, tmp_path / "out", format="mlx")
    with pytest.raises(weights.FileFormatError, match="its name is that of a file"):
        weights.write_adapter(weights.AdapterFile({"up": layer}), tmp_path / "out.safetensors", format="mlx")
    assert not any(path.name.startswith("out") for path in tmp_path.iterdir())
    weights.write_adapter(weights.AdapterFile({"a.up": layer}, components=("a",)), tmp_path / "out", format="mlx")
    assert list(weights.read_adapter(tmp_path / "out").layers) == ["up"]


# Hostile files


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_typed_error_or_a_patch_that_runs(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        kind = data.draw(st.sampled_from(["lora", "dora"]))
        shapes = {**UP, "lm_head.lora_a": (6, 2), "lm_head.lora_b": (2, 8)}
        shapes |= {"layers.0.up.m": (9,), "lm_head.m": (8,)} if kind == "dora" else {"embed_tokens.lora_a": (8, 2)}
        shapes |= {} if kind == "dora" else {"embed_tokens.lora_b": (2, 6)}
        folder(path, shapes, fine_tune_type=kind)
        tensors = {key: t.float() for key, t in weights.open(path).items()}
        about = json.loads((path / "adapter_config.json").read_text())
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.sampled_from(sorted(tensors)))
            what = data.draw(st.sampled_from(["tensor", "drop", "rename", "setting", "parameter", "parameter"]))
            if what == "tensor":
                tensors[at] = data.draw(st.sampled_from(CHANGES))(tensors[at])
            elif what == "drop" and len(tensors) > 1:
                del tensors[at]
            elif what == "rename":
                tensors[data.draw(st.sampled_from(["x", "lora_a", ".lora_a", f"{at}.lora_b", "m"]))] = tensors.pop(at)
            elif what == "setting":
                about[data.draw(st.sampled_from([*about, "lora_layers"]))] = data.draw(VALUES)
            elif isinstance(about.get("lora_parameters"), dict):
                about["lora_parameters"][data.draw(st.sampled_from([*PARAMETERS, "alpha"]))] = data.draw(VALUES)
        weights.save(tensors, path / "adapters.safetensors")
        (path / "adapter_config.json").write_text(json.dumps(about))
        attempt(net().float().eval(), path)


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_no_file_can_hold_is_not_written(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        layer = only(folder(path, UP))
        tensors, numbers = dict(layer.tensors), dict(layer.hyperparameters)
        for _ in range(data.draw(st.integers(1, 2))):
            if data.draw(st.booleans()):
                numbers[data.draw(st.sampled_from([*numbers, "bias", "init"]))] = data.draw(VALUES)
            else:
                at = data.draw(st.sampled_from(sorted(tensors)))
                tensors[at] = data.draw(st.sampled_from(CHANGES))(tensors[at])
        method = data.draw(st.sampled_from(["lora", "dora"]))
        where = data.draw(st.sampled_from(["up", "", "embed", "a/b", ".."]))
        file = weights.AdapterFile({where: weights.LayerWeights(method, numbers, tensors)})
        try:
            with bounded():
                weights.write_adapter(file, path / "out", format="mlx")
        except weights.WeightsError:
            assert not (path / "out").exists()
        else:
            weights.read_adapter(path / "out")
