"""The examples in the docstrings of files and reports, run on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adapters
import weights
from adapters import LoRA
from tests.adapters.models import perturb
from tests.docstrings import has_example, run_example

NAMES = [
    "Library",
    "Reduction",
    "Report",
    "combine_files",
    "extract_files",
    "load",
    "merge_files",
    "report",
    "resize_file",
]


@pytest.mark.parametrize("name", NAMES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    tensors = model.state_dict()
    weights.save(tensors, "someone/model/model.safetensors")
    tuned = {name: tensor + torch.randn_like(tensor) for name, tensor in tensors.items()}
    weights.save(tuned, "someone/tuned-model/model.safetensors")
    sources = ["someone/style-lora", "someone/pose-lora", "style.safetensors", "pose.safetensors"]
    for seed, path in enumerate(sources):
        patch = adapters.inject(model, LoRA(rank=2), targets=["0", "1"])
        perturb(patch, seed)
        patch.save_pretrained(path, format="fluxion")
        patch.eject()
    value = getattr(adapters, name)
    assert has_example(value)
    namespace = {"adapters": adapters, "weights": weights, "model": model, "x": torch.randn(2, 8)}
    run_example(value, {**namespace, "batch": torch.randn(3, 8)})
