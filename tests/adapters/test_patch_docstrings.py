"""The examples in the docstrings of patches, of the calls that make and use them, and of their errors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import adapters
from tests.docstrings import run_example, undocumented

NAMES = {
    name: getattr(adapters, name)
    for name in (
        *("Patch", "RankAllocator", "combine", "initialize", "inject", "parallel_plan", "patches", "use"),
        *(name for name in adapters.__all__ if name.endswith("Error")),
    )
}


def test_all_have_one() -> None:
    assert undocumented(NAMES) == []


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    other = copy.deepcopy(model)
    file = adapters.inject(other, adapters.LoRA(rank=4)).adapter_file()
    names = {"torch": torch, "adapters": adapters, "model": model, "x": torch.randn(2, 8), "file": file}
    run_example(NAMES[name], names)
