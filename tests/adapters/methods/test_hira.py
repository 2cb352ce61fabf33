"""HiRA against its formula."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import adapters
from adapters import AdapterError, HiRA
from tests.adapters.models import perturb


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.booleans(), st.sampled_from([1.0, -0.5]))
def test_linear(inputs: int, outputs: int, rank: int, bias: bool, scale: float) -> None:
    base = nn.Linear(inputs, outputs, bias=bias).double()
    model, x = nn.Sequential(base), torch.randn(3, inputs).double()
    patch = adapters.inject(model, HiRA(rank), scale=scale)
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)
    perturb(patch, std=1.0)
    a, b = patch.parameters()
    weight = base.weight.detach().clone()
    for o in range(outputs):
        for i in range(inputs):
            weight[o, i] *= 1 + scale * sum(b[o, r] * a[r, i] for r in range(rank)).item()
    torch.testing.assert_close(model(x), F.linear(x, weight, base.bias), rtol=1e-11, atol=1e-11)


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([1, 2]))
def test_convolution(rank: int, height: int, groups: int) -> None:
    base = nn.Conv2d(4, 6, (height, 2), stride=2, padding=1, groups=groups).double()
    model, x = nn.Sequential(base), torch.randn(2, 4, 7, 6).double()
    patch = adapters.inject(model, HiRA(rank))
    perturb(patch, std=1.0)
    a, b = patch.parameters()
    assert a.shape == (rank, 4 // groups, height, 2) and b.shape == (6, rank, 1, 1)
    weight = base.weight * (1 + torch.einsum("orxy,rikl->oikl", b, a))
    expected = F.conv2d(x, weight, base.bias, stride=2, padding=1, groups=groups)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


def test_embedding() -> None:
    base = nn.Embedding(5, 3).double()
    model, x = nn.Sequential(base), torch.tensor([[4, 0], [1, 4]])
    patch = adapters.inject(model, HiRA(2))
    assert torch.equal(model(x), base(x))
    perturb(patch, std=1.0)
    a, b = patch.parameters()
    assert a.shape == (2, 5) and b.shape == (3, 2)
    torch.testing.assert_close(model(x), F.embedding(x, base.weight * (1 + (b @ a).T)))


@pytest.mark.parametrize("rank", [0, -1, 1.5])
def test_bad_ranks(rank: int) -> None:
    with pytest.raises(AdapterError, match="HiRA needs a rank"):
        HiRA(rank)
