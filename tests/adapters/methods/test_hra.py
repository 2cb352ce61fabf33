"""HRA by its formula: one reflection after the other."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import HRA, AdapterError, TargetError


def reflect(weight: Tensor, u: Tensor, orthogonal: bool) -> Tensor:
    """`W ∏ᵢ (I - 2 uᵢ uᵢᵀ)`."""
    used: list[Tensor] = []
    for column in u.T:
        for before in used if orthogonal else ():
            column = column - before * (before @ column)
        used.append(column / column.norm())
        weight = weight - 2 * torch.outer(weight @ used[-1], used[-1])
    return weight


@settings(max_examples=25)
@given(st.integers(1, 6), st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_hra_reflects_inputs(rank: int, orthogonal: bool, convolution: bool, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    layer = nn.Conv2d(2, 4, (2, 3), padding=1, stride=2, dilation=2) if convolution else nn.Linear(7, 4)
    model = nn.Sequential(layer).double()
    x = torch.randn(2, 2, 8, 9).double() if convolution else torch.randn(3, 7).double()
    start = model(x)
    patch = adapters.inject(model, HRA(rank=rank, gram_schmidt=orthogonal))
    same = torch.allclose(model(x), start, rtol=1e-12, atol=1e-12)
    assert same == (rank % 2 == 0 and not orthogonal)
    u = torch.randn(layer.weight[0].numel(), rank).double()
    patch.load_state_dict({"0.hra_u": u})
    weight = reflect(layer.weight.flatten(1), u, orthogonal).view_as(layer.weight)
    expected = torch.func.functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    patch.merge()
    torch.testing.assert_close(model[0].weight.detach(), weight, rtol=1e-10, atol=1e-10)


def test_the_start_is_random_and_in_pairs() -> None:
    model = nn.Sequential(nn.Linear(6, 3))
    u = adapters.inject(model, HRA(rank=4)).state_dict()["0.hra_u"]
    assert torch.equal(u[:, 0], u[:, 1]) and torch.equal(u[:, 2], u[:, 3]) and not torch.equal(u[:, 0], u[:, 2])
    assert u.abs().max() <= 6**-0.5


def test_numbers_that_do_not_fit_are_refused() -> None:
    with pytest.raises(AdapterError, match="HRA needs a rank that is an integer of 1 or more, not 0"):
        HRA(rank=0)
    model = nn.Sequential(nn.Linear(6, 3))
    message = "0 has 6 inputs, so no 7 vectors are orthogonal to each other: choose a rank of 6 or less, or exclude it."
    with pytest.raises(TargetError, match=re.escape(message)):
        adapters.inject(model, HRA(rank=7, gram_schmidt=True))
    assert type(model[0]) is nn.Linear
