"""DoRA against its formula, written out row by row."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import AdapterError, DoRA, TargetError
from adapters.methods.core.decomposed import decomposed
from tests.adapters.models import perturb


def by_hand(weight: Tensor, state: dict[str, Tensor], path: str, scaling: float) -> Tensor:
    """`m (W + s B A) / ‖W + s B A‖` for each row of a matrix."""
    a, b = (state[f"{path}.lora_{name}.weight"].flatten(1) for name in "AB")
    rows = []
    for row, (w, m) in enumerate(zip(weight, state[f"{path}.lora_magnitude_vector"], strict=True)):
        v = w + scaling * sum(b[row, k] * a[k] for k in range(len(a)))
        rows.append(m * v / math.sqrt(sum(float(entry) ** 2 for entry in v)))
    return torch.stack(rows)


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.floats(0.1, 9), st.booleans(), st.integers(0, 2**20))
def test_linear(inputs: int, outputs: int, rank: int, alpha: float, rslora: bool, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    model, x = nn.Sequential(nn.Linear(inputs, outputs)).double(), torch.randn(3, inputs, dtype=torch.float64)
    base = model(x)
    patch = adapters.inject(model, DoRA(rank=rank, alpha=alpha, rslora=rslora))
    torch.testing.assert_close(model(x), base, rtol=1e-12, atol=1e-12)
    perturb(patch, seed)
    scaling = alpha / (math.sqrt(rank) if rslora else rank)
    layer = model[0].base
    weight = by_hand(layer.weight, patch.state_dict(), "0", scaling)
    torch.testing.assert_close(model(x), x @ weight.T + layer.bias, rtol=1e-10, atol=1e-10)
    patch.scale = 0.25
    between = 0.75 * layer.weight + 0.25 * weight
    torch.testing.assert_close(model(x), x @ between.T + layer.bias, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("options", [{}, {"dilation": 2}, {"groups": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_convolution(options: dict[str, Any]) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, **options)).double(), torch.randn(2, 4, 6, 6, dtype=torch.float64)
    base = model(x)
    patch = adapters.inject(model, DoRA(rank=2, alpha=3))
    torch.testing.assert_close(model(x), base, rtol=1e-12, atol=1e-12)
    perturb(patch)
    layer = model[0].base
    weight = by_hand(layer.weight.flatten(1), patch.state_dict(), "0", 1.5).view_as(layer.weight)
    changed = nn.Conv2d(4, 6, 3, **options).double()
    changed.load_state_dict({"weight": weight, "bias": layer.bias})
    torch.testing.assert_close(model(x), changed(x), rtol=1e-10, atol=1e-10)


def test_the_rows_of_an_embedding_are_its_dimensions() -> None:
    """Each dimension has one length, over the whole vocabulary."""
    model, x = nn.Sequential(nn.Embedding(7, 4)).double(), torch.arange(7)
    patch = adapters.inject(model, DoRA(rank=2, alpha=3))
    perturb(patch)
    state = patch.state_dict()
    assert state["0.lora_magnitude_vector"].shape == (4,)
    v = model[0].base.weight + 1.5 * state["0.lora_A.weight"] @ state["0.lora_B.weight"].T
    torch.testing.assert_close(model(x), v * state["0.lora_magnitude_vector"] / v.norm(dim=0))


def test_the_length_is_a_constant_to_the_gradient() -> None:
    direction, magnitude = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    factor = torch.randn(3, 4)
    found = torch.autograd.grad((decomposed(direction, magnitude) * factor).sum(), (direction, magnitude))
    norms = direction.detach().norm(dim=1, keepdim=True)
    torch.testing.assert_close(found[0], factor * magnitude.detach().unsqueeze(1) / norms)
    torch.testing.assert_close(found[1], (factor * direction.detach() / norms).sum(1))


def test_a_row_of_zeros_is_left_and_can_be_trained() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3)).double(), torch.randn(5, 4, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[1] = 0
    base, target = model(x), torch.randn(5, 3, dtype=torch.float64)
    patch = adapters.inject(model, DoRA(rank=2))
    torch.testing.assert_close(model(x), base, rtol=1e-12, atol=1e-12)
    optimizer = torch.optim.Adam(patch.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = (model(x) - target)[:, 1].square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(AdapterError, match="DoRA needs bias=False, not True"):
        DoRA(bias=True)
    with pytest.raises(AdapterError, match="DoRA needs a rank that is an integer of 1 or more, not 0"):
        DoRA(rank=0)
    with pytest.raises(TargetError, match=r"give it a DoRA with dropout=0"):
        adapters.inject(nn.Sequential(nn.Linear(2, 2)), DoRA(rank=1, dropout=0.1))
