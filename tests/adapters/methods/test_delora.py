"""DeLoRA against its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import adapters
from adapters import AdapterError, DeLoRA
from tests.adapters.models import perturb


@settings(max_examples=30)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.floats(0.1, 20), st.sampled_from([1.0, -0.5]))
def test_linear(inputs: int, outputs: int, rank: int, boundary: float, scale: float) -> None:
    base = nn.Linear(inputs, outputs).double()
    model, x = nn.Sequential(base), torch.randn(3, inputs).double()
    patch = adapters.inject(model, DeLoRA(rank, boundary), scale=scale)
    assert torch.equal(model(x), base(x))
    a, b, strength = patch.parameters()
    assert strength.tolist() == [boundary]
    perturb(patch, std=1.0)
    weight = base.weight.detach().clone()
    for r in range(rank):
        normalised = torch.outer(b[:, r] / b[:, r].norm(), a[r] / a[r].norm())
        weight += scale * strength / rank * normalised * base.weight.norm(dim=0)
    torch.testing.assert_close(model(x), F.linear(x, weight, base.bias), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("groups", [1, 2])
def test_convolution(groups: int) -> None:
    base = nn.Conv2d(4, 6, (3, 2), padding=1, groups=groups).double()
    model, x = nn.Sequential(base), torch.randn(2, 4, 7, 6).double()
    patch = adapters.inject(model, DeLoRA(2))
    perturb(patch, std=1.0)
    a, b, strength = patch.parameters()
    update = torch.einsum("or,ri->oi", b / b.norm(dim=0), a / a.norm(dim=1, keepdim=True)) * strength / 2
    weight = base.weight + update.view_as(base.weight) * base.weight.norm(dim=0)
    torch.testing.assert_close(model(x), F.conv2d(x, weight, base.bias, padding=1, groups=groups))


def test_the_boundary_bounds_the_update() -> None:
    """However long A and B are, the update is no longer than λ, in units of the columns of the weight."""
    base = nn.Linear(6, 5).double()
    model = nn.Sequential(base)
    patch = adapters.inject(model, DeLoRA(3, boundary=2))
    a, b, _ = patch.parameters()
    for length in (0.1, 1.0, 100.0):
        with torch.no_grad():
            a.normal_(std=length)
            b.normal_(std=length)
        assert ((model[0].weight - base.weight) / base.weight.norm(dim=0)).norm() <= 2 + 1e-9


def test_the_norms_are_of_the_weight_at_injection_and_kept() -> None:
    base = nn.Linear(6, 5).double()
    model = nn.Sequential(base)
    patch = adapters.inject(model, DeLoRA(3))
    norms = patch.state_dict()["0.delora_w_norm"]
    torch.testing.assert_close(norms, base.weight.norm(dim=0).detach())
    assert [name for name, _ in patch.named_parameters()] == ["0.delora_A", "0.delora_B", "0.delora_lambda"]
    with torch.no_grad():
        base.weight.mul_(2)
    assert torch.equal(patch.state_dict()["0.delora_w_norm"], norms)


@pytest.mark.parametrize("options", [{"rank": 0}, {"boundary": math.inf}, {"boundary": "1"}])
def test_bad_numbers(options: dict[str, object]) -> None:
    with pytest.raises(AdapterError, match=f"DeLoRA needs a {next(iter(options))}"):
        DeLoRA(**options)  # type: ignore[arg-type]
