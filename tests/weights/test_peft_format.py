"""The PEFT format: files of the real library are read, and the real library reads what is written here."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from huggingface_hub import ModelCard
from torch import Tensor, nn

import weights


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.out = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.fc(x)))


class Net(nn.Module):
    """Has `fc`, `block.fc` and `fcx`: the end of a path is another whole path, and dots matter."""

    def __init__(self) -> None:
        super().__init__()
        torch.default_generator.manual_seed(0)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.block = Block()
        self.fc = nn.Linear(6, 6)
        self.block_fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_fc(self.fc(self.block(self.conv(x).mean((2, 3)))))


def lora(r: int, a: float, shape: tuple[int, ...], **others: Any) -> weights.LayerWeights:
    """A random LoRA of a weight of this shape."""
    return weights.LayerWeights(
        "lora",
        {"rank": r, "alpha": a, "dropout": 0.0, "rslora": False, "bias": False, **others},
        {
            "lora_A": torch.randn(r, *shape[1:]),
            "lora_B": torch.randn(shape[0], r, *[1] * (len(shape) - 2)),
        },
    )


def applied(adapter: weights.AdapterFile) -> Net:
    """The net with the adapter added to its weights: what the numbers and tensors mean, written out."""
    net = Net().double()
    with torch.no_grad():
        for path, layer in adapter.layers.items():
            a, b = layer.tensors["lora_A"].double(), layer.tensors["lora_B"].double()
            numbers = layer.hyperparameters
            rank = float(numbers["rank"])
            scale = float(numbers["alpha"]) / (math.sqrt(rank) if numbers["rslora"] else rank)
            weight = net.get_submodule(path).weight
            weight += scale * (b.flatten(1) @ a.flatten(1)).reshape(weight.shape)
    return net


def equal_outputs(one: nn.Module, other: nn.Module) -> bool:
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        return torch.allclose(one.double().eval()(x), other.double().eval()(x), rtol=1e-8, atol=1e-8)


def changed(folder: Path, **settings: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return weights.write_adapter(weights.AdapterFile({"fc": lora(2, 4.0, (6, 6))}), tmp_path / "adapter")


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"fc": 3, "conv": 4}, "alpha_pattern": {r"b\w+\.fc": 5}}])
def test_a_file_of_the_real_library_means_the_same_here(tmp_path: Path, rslora: bool, patterns: Any) -> None:
    config = peft.LoraConfig(
        r=2,
        lora_alpha=7,
        lora_dropout=0.25,
        use_rslora=rslora,
        target_modules=["conv", "fc", "out"],
        init_lora_weights=False,
        **patterns,
    )
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    adapter = weights.read_adapter(tmp_path)
    assert set(adapter.layers) == {"conv", "block.fc", "block.out", "fc"}
    assert {layer.hyperparameters["dropout"] for layer in adapter.layers.values()} == {0.25}
    assert adapter.layers["block.fc"].hyperparameters["alpha"] == (5.0 if patterns else 7.0)
    assert equal_outputs(applied(adapter), model)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("uniform", [False, True])
def test_the_real_library_means_the_same_by_a_file_of_ours(tmp_path: Path, rslora: bool, uniform: bool) -> None:
    shapes = dict.fromkeys(("block.fc", "fc", "block.out", "block_fc"), (6, 6)) | {"conv": (6, 2, 3, 3)}
    numbers = [(2, 4.0)] * 5 if uniform else [(2, 4.0), (3, 0.5), (2, 4.0), (5, 6.0), (3, 1.0)]
    adapter = weights.AdapterFile(
        {
            path: lora(rank, alpha, shape, rslora=rslora)
            for (path, shape), (rank, alpha) in zip(shapes.items(), numbers, strict=True)
        }
    )
    weights.write_adapter(adapter, tmp_path)
    with warnings.catch_warnings(action="error"):
        loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert equal_outputs(applied(adapter), loaded)
    config = loaded.peft_config["default"]
    assert (config.r, config.lora_alpha) == (2, 4)
    assert (len(config.rank_pattern), len(config.alpha_pattern)) == ((0, 0) if uniform else (3, 3))
    again = weights.read_adapter(tmp_path)
    assert {path: layer.hyperparameters for path, layer in again.layers.items()} == {
        path: layer.hyperparameters for path, layer in adapter.layers.items()
    }


def test_a_pattern_for_a_path_does_not_reach_a_longer_path(tmp_path: Path) -> None:
    """`fc` differs from the default and `block.fc` does not, though PEFT tries patterns on the ends of paths."""
    layers = {"fc": lora(3, 1.0, (6, 6)), "block.fc": lora(2, 4.0, (6, 6)), "block.out": lora(2, 4.0, (6, 6))}
    adapter = weights.AdapterFile(layers)
    weights.write_adapter(adapter, tmp_path)
    assert weights.read_adapter(tmp_path).layers["block.fc"].hyperparameters["rank"] == 2
    assert equal_outputs(applied(adapter), peft.PeftModel.from_pretrained(Net(), tmp_path))


OF_ONE_LAYER = {
    "lora": lora(2, 4.0, (6, 6)),
    "ia3": weights.LayerWeights("ia3", {"feedforward": True}, {"ia3_l": torch.randn(1, 6)}),
    "road": weights.LayerWeights(
        "road", {"variant": "road_1", "group_size": 2}, {"road_theta": torch.randn(3), "road_alpha": torch.randn(3)}
    ),
    "vera": weights.LayerWeights(
        "vera", {"rank": 2}, {"vera_lambda_b": torch.randn(6), "vera_lambda_d": torch.randn(2)}
    ),
}


@pytest.mark.parametrize("path", ["fc", "block.fc"])
@pytest.mark.parametrize("method", OF_ONE_LAYER)
def test_the_real_library_adapts_no_other_layer_of_that_name(tmp_path: Path, method: str, path: str) -> None:
    """There are `fc` and `block.fc`, and around them `outer`: what PEFT has in a list it takes for ends of paths."""
    shared = {"vera_A": torch.randn(2, 6), "vera_B": torch.randn(6, 2)} if method == "vera" else {}
    weights.write_adapter(weights.AdapterFile({path: OF_ONE_LAYER[method]}, shared=shared), tmp_path)
    model = nn.ModuleDict({"fc": nn.Linear(6, 6), "block": Block(), "outer": Net()})
    with warnings.catch_warnings(action="error"):
        loaded = peft.PeftModel.from_pretrained(model, tmp_path)
    adapted = {name for name, module in loaded.base_model.model.named_modules() if hasattr(module, "active_adapter")}
    assert adapted == {path}
    assert weights.read_adapter(tmp_path).layers.keys() == {path}


@pytest.mark.parametrize("dora", [False, True])
def test_the_rank_is_that_of_the_tensors_where_sorting_hid_the_pattern(tmp_path: Path, dora: bool) -> None:
    """PEFT takes the first pattern that matches, and sorts them when it saves: its own loader then finds no rank 3."""
    patterns = {r"block\.fc": 3, "(.*fc)": 5}
    config = peft.LoraConfig(
        r=2, target_modules=["fc", "out"], rank_pattern=patterns, init_lora_weights=False, use_dora=dora
    )
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(Net(), config)
    model.save_pretrained(tmp_path)
    assert list(json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]) != list(patterns)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(Net(), tmp_path)
    ranks = {path: layer.hyperparameters["rank"] for path, layer in weights.read_adapter(tmp_path).layers.items()}
    assert ranks == {"block.fc": 3, "block.out": 2, "fc": 5}


def test_everything_comes_back(tmp_path: Path) -> None:
    layers = {"fc": lora(2, 4.0, (6, 6), dropout=0.5), "conv": lora(3, 0.5, (6, 2, 3, 3), dropout=0.5)}
    written = weights.AdapterFile(layers, base_model="someone/base", metadata={"format": "pt"})
    assert weights.write_adapter(written, tmp_path / "a") == tmp_path / "a"
    read = weights.read_adapter(tmp_path / "a")
    assert (read.base_model, read.metadata) == (written.base_model, written.metadata)
    for path, layer in layers.items():
        assert read.layers[path].method == "lora"
        assert read.layers[path].hyperparameters == layer.hyperparameters
        assert all(torch.equal(read.layers[path].tensors[name], tensor) for name, tensor in layer.tensors.items())
    weights.write_adapter(read, tmp_path / "b")
    for file in (tmp_path / "a").iterdir():
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()
    assert weights.read_adapter(tmp_path / "a" / "adapter_model.safetensors").layers.keys() == layers.keys()


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"peft_type": "MAGIC"}, "peft_type is 'MAGIC'"),
        ({"peft_type": None}, "peft_type is None"),
        ({"use_qalora": True, "arrow_config": {"a": 1}}, "arrow_config=.* is not supported; use_qalora=True"),
        ({"a_setting_of_tomorrow": 3}, "a_setting_of_tomorrow=3"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4' is not supported"),
        ({"r": 3}, r"layer 'fc' has lora_A \(2, 6\) and lora_B \(6, 2\) of rank 3, a shape mismatch"),
        ({"rank_pattern": {"fc": 5}}, "rank 5"),
        ({"rank_pattern": {"f(c": 5}}, "rank_pattern is not a dict"),
        ({"rank_pattern": {"(" * 9999: 5}}, "rank_pattern is not a dict"),
        ({"alpha_pattern": {"f{99999999999999}": 5}}, "alpha_pattern is not a dict"),
        ({"alpha_pattern": {"((f|c)+)+$": 5}}, "alpha_pattern has regular expressions that take too long to match"),
        ({"lora_alpha": 10**400}, "lora_alpha=10+ is not a number"),
        ({"alpha_pattern": {"fc": "5"}}, "alpha_pattern is not a dict"),
        ({"lora_alpha": "16"}, "lora_alpha='16' is not a number"),
        ({"lora_alpha": math.nan}, "lora_alpha=nan is not a number"),
        ({"use_rslora": "yes"}, "use_rslora"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
        ({"modules_to_save": "out"}, "modules_to_save is not a list of names"),
        ({"bias": True}, "bias is not a string"),
        ({"trainable_token_indices": "12"}, "trainable_token_indices is not a list of numbers, nor a dict of such"),
        ({"trainable_token_indices": {"fc": [1, "2"]}}, "trainable_token_indices is not"),
        ({"peft_type": "TRAINABLE_TOKENS", "token_indices": [1.5]}, r"token_indices=\[1.5\] is not a list of whole"),
    ],
)
def test_settings_that_would_be_dropped_are_refused(folder: Path, settings: Any, match: str) -> None:
    with pytest.raises(weights.FileFormatError, match=match):
        weights.read_adapter(changed(folder, **settings))


@pytest.mark.parametrize(
    ("key", "shape", "match"),
    [
        (
            "base_model.model.out.lora_A.weight",
            (2, 6),
            r"`base_model\.model\.out\.lora_A\.weight` has no `base_model\.model\.out\.lora_B\.weight`",
        ),
        ("base_model.model.out.lora_magnitude_vector", (6,), "lora_magnitude_vector' is not expected"),
        ("fc.lora_A.weight", (2, 6), "'fc.lora_A.weight' is not expected"),
        ("base_model.model.out.weight", (6, 6), "'base_model.model.out.weight' is not expected"),
        ("base_model.model.out.bias", (6,), "'base_model.model.out.bias' is not expected"),
        (
            "base_model.model.out.token_adapter.trainable_tokens_delta",
            (1, 6),
            "trainable_tokens_delta' is not expected",
        ),
        ("base_model.model.fc.lora_A.weight", (2, 6, 1), r"\(2, 6, 1\)"),
        ("base_model.model.fc.lora_B.weight", (6,), r"\(6,\)"),
        ("base_model.model.fc.lora_B.weight", (6, 3), r"\(6, 3\)"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(folder: Path, key: str, shape: tuple[int, ...], match: str) -> None:
    path = folder / "adapter_model.safetensors"
    weights.save({**weights.open(path), key: torch.ones(shape)}, path)
    with pytest.raises(weights.FileFormatError, match=match):
        weights.read_adapter(folder)


def test_files_that_are_not_there_or_not_sound(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(weights.FileFormatError, match=r"no adapter in a known format \(fluxion, peft, "):
        weights.read_adapter(tmp_path)
    weights.save({}, folder / "adapter_model.safetensors")
    with pytest.raises(weights.FileFormatError, match="no adapter in it"):
        weights.read_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(weights.SourceNotFoundError, match=r"pickle \(\.bin\)"):
        weights.read_adapter(folder)
    for content in ("{", "[]", "[" * 100_000):
        (folder / "adapter_config.json").write_text(content)
        with pytest.raises(weights.FileFormatError, match=r"adapter_config\.json is not"):
            weights.read_adapter(folder)


@pytest.mark.parametrize(
    ("layers", "match"),
    [
        ({}, "no layers"),
        ({"fc": weights.LayerWeights("magic", {}, {})}, "method 'magic'"),
        ({"fc": weights.LayerWeights("lora", {}, {}), "out": weights.LayerWeights("loha", {}, {})}, "several methods"),
        ({"fc": lora(2, 4.0, (6, 6), alpha=None)}, "no usable alpha"),
        ({"fc": lora(2, 4.0, (6, 6), rank=3)}, "rank 3"),
        ({"fc": lora(2, 4.0, (6, 6)), "out": lora(2, 4.0, (6, 6), dropout=0.1)}, "differ in dropout"),
        ({"fc": lora(2, 4.0, (6, 6)), "out": lora(2, 4.0, (6, 6), rslora=True)}, "differ in rslora"),
        (
            {
                "fc": weights.LayerWeights(
                    "trainable_tokens", {"tokens": (1,)}, {"trainable_tokens_delta": torch.ones(2, 6)}
                )
            },
            r"rows of the shape \(2, 6\), which are not one for each of the tokens \(1,\)",
        ),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_writing(tmp_path: Path, layers: Any, match: str) -> None:
    with pytest.raises(weights.FileFormatError, match=match):
        weights.write_adapter(weights.AdapterFile(layers), tmp_path / "adapter")
    with pytest.raises(weights.FileFormatError, match="'pefd' is no format that is written"):
        weights.write_adapter(weights.AdapterFile(layers), tmp_path / "adapter", format="pefd")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_changes_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in folder.iterdir()}

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("weights.disk.atomic.read_header", fail)
    with pytest.raises(weights.FileWriteError, match="No space left"):
        weights.write_adapter(weights.AdapterFile({"fc": lora(4, 1.0, (6, 6))}), folder)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_the_card_says_what_it_is_and_how_to_load_it(tmp_path: Path) -> None:
    layers = {"fc": lora(2, 4.0, (6, 6)), "conv": lora(3, 0.5, (6, 2, 3, 3))}
    weights.write_adapter(weights.AdapterFile(layers, base_model="someone/base"), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.to_dict() == {
        "base_model": "someone/base",
        "base_model_relation": "adapter",
        "library_name": "fluxion-adapters",
        "tags": ["fluxion-adapters", "peft", "lora", "base_model:adapter:someone/base"],
    }
    assert "| lora | 2 | 2 to 3 | 0.5 to 4 | 96 |" in card.text
    assert "adapters.load(model," in card.text and "PeftModel.from_pretrained(model," in card.text


@pytest.mark.parametrize("base", [None, "/home/me/base", "./base", "C:\\models\\base", "a/b/c"])
def test_a_base_model_only_this_machine_knows_is_not_in_the_card(tmp_path: Path, base: str | None) -> None:
    weights.write_adapter(weights.AdapterFile({"fc": lora(2, 4.0, (6, 6))}, base_model=base), tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None and card.data.tags == ["fluxion-adapters", "peft", "lora"]
    assert base is None or base not in card.content


def test_a_card_written_by_hand_is_kept(folder: Path) -> None:
    (folder / "README.md").write_text("mine")
    weights.write_adapter(weights.AdapterFile({"fc": lora(4, 1.0, (6, 6))}), folder)
    assert (folder / "README.md").read_text() == "mine"
    assert weights.read_adapter(folder).layers["fc"].hyperparameters["rank"] == 4
