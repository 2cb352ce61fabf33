"""RoAd against its formula, pair by pair."""

from __future__ import annotations

from math import cos, sin

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adapters
from adapters import AdapterError, RoAd, TargetError
from tests.adapters.models import perturb


@settings(max_examples=40)
@given(st.sampled_from(["road_1", "road_2", "road_4"]), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_pairs_are_rotated_and_scaled(variant: str, half: int, groups: int, bias: bool) -> None:
    size = 2 * half
    base = nn.Linear(3, size * groups, bias=bias).double()
    model, x = nn.Sequential(base), torch.randn(3).double()
    patch = adapters.inject(model, RoAd(variant, size))
    y = base(x)
    torch.testing.assert_close(model(x), y, rtol=1e-12, atol=1e-12)
    perturb(patch, std=1.0)
    theta, alpha = (next(p for name, p in patch.named_parameters() if name.endswith(end)) for end in ("theta", "alpha"))
    expected = torch.empty_like(y)
    for group in range(groups):
        for element in range(half):
            p, q = group * size + element, group * size + half + element
            if variant == "road_1":
                own_p = other_p = own_q = other_q = group * half + element
            elif variant == "road_2":
                own_p, other_p, own_q, other_q = p, p, q, q
            else:
                own_p, own_q = 2 * group * size + element, 2 * group * size + half + element
                other_p, other_q = own_p + size, own_q + size
            expected[p] = alpha[own_p] * cos(theta[own_p]) * y[p] - alpha[other_p] * sin(theta[other_p]) * y[q]
            expected[q] = alpha[own_q] * cos(theta[own_q]) * y[q] + alpha[other_q] * sin(theta[other_q]) * y[p]
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_the_plain_variant_keeps_lengths_when_its_scales_are_one() -> None:
    base = nn.Linear(3, 8).double()
    model, x = nn.Sequential(base), torch.randn(5, 3).double()
    patch = adapters.inject(model, RoAd(group_size=4))
    with torch.no_grad():
        for name, parameter in patch.named_parameters():
            if name.endswith("theta"):
                parameter.normal_()
    torch.testing.assert_close(model(x).norm(dim=-1), base(x).norm(dim=-1))
    assert not torch.allclose(model(x), base(x))


@pytest.mark.parametrize("options", [{"variant": "road_3"}, {"group_size": 3}, {"group_size": 0}, {"group_size": 2.0}])
def test_bad_numbers(options: dict[str, object]) -> None:
    with pytest.raises(AdapterError, match=f"RoAd needs a {next(iter(options))}"):
        RoAd(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.Linear(3, 6), "0 has 6 outputs, which group_size=4 does not divide: choose a divisor"),
        (nn.Conv1d(4, 12, 1, groups=2), "0 has 6 outputs in each of 2 groups, which group_size=4 does not divide"),
    ],
)
def test_outputs_that_do_not_divide(layer: nn.Module, said: str) -> None:
    with pytest.raises(TargetError, match=said):
        adapters.inject(nn.Sequential(layer), RoAd(group_size=4))


def test_groups_of_a_convolution_are_not_mixed() -> None:
    model, x = nn.Sequential(nn.Conv1d(4, 8, 3, groups=2)).double(), torch.randn(2, 4, 6).double()
    patch = adapters.inject(model, RoAd(group_size=4))
    perturb(patch)
    expected = model(x)
    patch.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
