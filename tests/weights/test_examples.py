"""The examples in docstrings."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest
import torch

import weights

MODULES = (
    "weights.adapter_file",
    "weights.adapter_io",
    "weights.families.core.family",
    "weights.formats",
    "weights.formats.common.key_ends",
    "weights.methods.core.factors",
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    module = import_module(name)
    names = {**vars(module), "torch": torch, "weights": weights}
    failed, tried = doctest.testmod(module, globs=names)
    assert tried and not failed


def test_an_adapter_file_is_printed_by_shapes_and_counts() -> None:
    tensors = {"lora_A": torch.zeros(2, 3), "lora_B": torch.zeros(4, 2)}
    layer = weights.LayerWeights("lora", {"rank": 2, "alpha": 1.0}, tensors)
    assert repr(layer) == "LayerWeights('lora', rank=2, alpha=1.0, lora_A (2, 3), lora_B (4, 2))"
    file = weights.AdapterFile({"a": layer}, "me/base", task="CAUSAL_LM", format="peft")
    expected = "AdapterFile(1 layer of lora, 14 parameters, base_model='me/base', task='CAUSAL_LM', format='peft')"
    assert repr(file) == expected
    assert repr(weights.AdapterFile({})) == "AdapterFile(0 layers, 0 parameters)"
