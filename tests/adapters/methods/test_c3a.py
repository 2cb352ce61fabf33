"""C3A by its formula: circular convolutions, written out number by number; and PEFT's sizes for some layers."""

from __future__ import annotations

import copy
import re
import warnings
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adapters
from adapters import C3A, AdapterError, TargetError


@settings(max_examples=25)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_c3a_adds_circulant_blocks(size: int, rows: int, columns: int, convolution: bool, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    layer = nn.Conv1d(columns, rows * size, size) if convolution else nn.Linear(columns * size, rows * size)
    model = nn.Sequential(layer).double()
    x = torch.randn(2, columns, 7).double() if convolution else torch.randn(3, columns * size).double()
    start = model(x)
    patch = adapters.inject(model, C3A(block_size=size))
    torch.testing.assert_close(model(x), start, rtol=1e-12, atol=1e-12)
    kernel = torch.randn(rows, columns, size).double()
    patch.load_state_dict({"0.c3a_kernel": kernel})
    weight = layer.weight.detach().flatten(1).clone()
    for i in range(rows * size):
        for j in range(columns * size):
            weight[i, j] += kernel[i // size, j // size, (j - i) % size] / (columns * size)
    expected = torch.func.functional_call(layer, {"weight": weight.view_as(layer.weight)}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterError, match="C3A needs a block_size that is an integer of 1 or more, not 0"):
        C3A(block_size=0)
    for layer in (nn.Linear(6, 4), nn.Linear(4, 6)):
        message = (
            f"0 has {layer.out_features} outputs and {layer.in_features} inputs, which block_size=4 does not divide"
        )
        with pytest.raises(TargetError, match=re.escape(message)):
            adapters.inject(nn.Sequential(layer), C3A(block_size=4))


@torch.no_grad()
def test_layers_may_have_sizes_of_their_own_in_a_file(tmp_path: Path) -> None:
    """PEFT looks a layer up by its plain path, or by a pattern that has to begin after a dot."""
    base = nn.Sequential(nn.ModuleDict({"up": nn.Linear(4, 8), "down": nn.Linear(8, 4)}), nn.Linear(4, 4))
    with warnings.catch_warnings(action="ignore"):
        config = peft.C3AConfig(target_modules=["up", "down", "1"], block_size=2, block_size_pattern={"down": 4})
        theirs = peft.get_peft_model(copy.deepcopy(base), config)
        theirs.save_pretrained(tmp_path / "theirs")
        ours = copy.deepcopy(base)
        patch = adapters.load(ours, tmp_path / "theirs")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), patch.save_pretrained(tmp_path / "ours"))
    sizes = {place.path: place.branch.method.block_size for place in patch.attachments}
    assert sizes == {"0.up": 2, "0.down": 4, "1": 2}
    for path in sizes:
        x = torch.randn(3, base.get_submodule(path).in_features)
        expected = theirs.base_model.model.get_submodule(path)(x)
        torch.testing.assert_close(ours.get_submodule(path)(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(again.base_model.model.get_submodule(path)(x), expected, rtol=1e-5, atol=1e-5)
