"""Examples in the docstrings of weights: every public class and function has one, and each is run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adapters
import weights
from tests.docstrings import public_names, run_example, undocumented
from tests.weights.hub_server import WRITER, HubServer

NAMES = public_names(weights)


@pytest.fixture
def places(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with an adapter, and repositories with that adapter, with a model and with a pipeline."""
    monkeypatch.setenv("HF_TOKEN", WRITER)
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential()
    model.add_module("fc", nn.Linear(2, 3))
    adapters.inject(model, adapters.LoRA(rank=2), name="style").save_pretrained("out")
    hub.add("someone/style-lora", {path.name: path.read_bytes() for path in Path("out").iterdir()})

    def file(*names: str) -> bytes:
        tensors = {name: torch.ones(3) if name.endswith("bias") else torch.ones(3, 2) for name in names}
        return weights.save(tensors, "part.safetensors").read_bytes()

    hub.add("someone/model", {"model.safetensors": file("fc.weight", "fc.bias")})
    parts = {"unet": file("fc.weight", "fc.bias"), "text_encoder": file("fc.weight")}
    hub.add("someone/pipeline", {f"{part}/model.safetensors": content for part, content in parts.items()})


def test_every_public_name_has_an_example() -> None:
    assert undocumented(NAMES) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("places")
def test_examples_run(name: str) -> None:
    run_example(NAMES[name], {"torch": torch, "weights": weights})
