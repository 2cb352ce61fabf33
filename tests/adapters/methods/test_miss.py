"""MiSS and Bat by their formulas, written out number by number and block by block."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adapters
from adapters import AdapterError, Bat, MiSS, TargetError


@settings(max_examples=25)
@given(st.integers(1, 6), st.sampled_from([0, 1, 2, 4]), st.booleans(), st.integers(0, 2**16))
def test_miss_repeats_a_block(rank: int, mini_r: int, convolution: bool, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    layer = nn.Conv2d(2, 4, (3, 1)) if convolution else nn.Linear(7, 4)
    model = nn.Sequential(layer).double()
    x = torch.randn(2, 2, 5, 5).double() if convolution else torch.randn(3, 7).double()
    start = model(x)
    patch = adapters.inject(model, MiSS(rank=rank, mini_r=mini_r))
    torch.testing.assert_close(model(x), start, rtol=1e-12, atol=1e-12)
    block = torch.randn(rank, mini_r or 4).double()
    patch.load_state_dict({"0.miss_block": block})
    weight = layer.weight.detach().flatten(1).clone()
    for i, row in enumerate(weight):
        for j in range(len(row)):
            row[j] += block[j % rank, i % (mini_r or 4)]
    expected = torch.func.functional_call(layer, {"weight": weight.view_as(layer.weight)}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(0, 2**16))
def test_bat_multiplies_and_adds_a_block(rank: int, rows: int, columns: int, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    model = nn.Sequential(nn.Linear(columns * rank, rows * rank)).double()
    x, base = torch.randn(3, columns * rank).double(), model[0]
    start = model(x)
    patch = adapters.inject(model, Bat(rank=rank))
    torch.testing.assert_close(model(x), start, rtol=1e-12, atol=1e-12)
    blocks = torch.randn(rows, rank, rank).double()
    patch.load_state_dict({"0.miss_block": blocks})
    weight = base.weight.detach().clone()
    for i in range(rows):
        for j in range(columns):
            own = weight[i * rank : (i + 1) * rank, j * rank : (j + 1) * rank]
            own += own @ blocks[i] + blocks[i]
    torch.testing.assert_close(model(x), x @ weight.T + base.bias, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "numbers", "message"),
    [
        (MiSS, {"rank": 0}, "a rank that is an integer of 1 or more, not 0"),
        (MiSS, {"mini_r": -1}, "a mini_r that is an integer of 0 or more, not -1"),
        (Bat, {"rank": 1.5}, "a rank that is an integer of 1 or more, not 1.5"),
    ],
)
def test_numbers_out_of_range_are_refused(method: type[adapters.Method], numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)):
        method(**numbers)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (MiSS(rank=7), "0 has 4 outputs and 6 inputs, which do not fit rank=7 and mini_r=0"),
        (MiSS(rank=2, mini_r=3), "0 has 4 outputs and 6 inputs, which do not fit rank=2 and mini_r=3"),
        (Bat(rank=3), "0 has 4 outputs and 6 inputs, which rank=3 does not divide"),
        (Bat(rank=4), "0 has 4 outputs and 6 inputs, which rank=4 does not divide"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(method: adapters.Method, message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(TargetError, match=re.escape(message)):
        adapters.inject(model, method)
    assert type(model[0]) is nn.Linear
