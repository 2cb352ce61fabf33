"""(IA)³ against its formula, number by number."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import adapters
from adapters import IA3
from tests.adapters.models import perturb


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.booleans(), st.booleans(), st.sampled_from([1.0, 0.25, -1.5]))
def test_linear(inputs: int, outputs: int, bias: bool, feedforward: bool, scale: float) -> None:
    model, x = nn.Sequential(nn.Linear(inputs, outputs, bias=bias)).double(), torch.randn(3, inputs).double()
    base = model[0]
    patch = adapters.inject(model, IA3(feedforward), scale=scale)
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)
    perturb(patch, std=1.0)
    (own,) = patch.parameters()
    assert own.shape == ((1, inputs) if feedforward else (outputs, 1))
    factors = 1 + scale * (own.flatten() - 1)
    expected = base(x * factors) if feedforward else base(x) * factors
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    one = x[0]  # Without any dimension of samples.
    torch.testing.assert_close(model(one), expected[0], rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(
    st.sampled_from([1, 2, 4]), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.booleans(), st.booleans()
)
def test_convolution(groups: int, factor: int, height: int, stride: int, feedforward: bool, transposed: bool) -> None:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    base = kind(4, 4 * factor, (height, 2), stride=stride, groups=groups).double()
    model, x = nn.Sequential(base), torch.randn(2, 4, 7, 6).double()
    patch = adapters.inject(model, IA3(feedforward))
    perturb(patch, std=1.0)
    (own,) = patch.parameters()
    assert own.shape == (1, 4 if feedforward else 4 * factor, 1, 1)
    expected = base(x * own) if feedforward else base(x) * own
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    patch.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("feedforward", [False, True])
def test_embedding(feedforward: bool) -> None:
    model, x = nn.Sequential(nn.Embedding(5, 3)).double(), torch.tensor([[4, 0], [1, 4]])
    weight = model[0].weight
    patch = adapters.inject(model, IA3(feedforward))
    perturb(patch, std=1.0)
    (own,) = patch.parameters()
    torch.testing.assert_close(model(x), F.embedding(x, weight * own.T))
