"""RandLoRA, against its formula written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import AdapterError, RandLoRA, TargetError
from tests.adapters.methods.closed_form import delta_of, few, layers_of, numbers


def update(scale: float, lambdas: Tensor, gammas: Tensor, a: Tensor, b: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The sum of outer products, of the p-th column of all bases and the p-th of all scaled rows of A."""
    short, long = sorted(shape)
    rank, bases = lambdas.shape
    columns = [b[:long, base, column] for base in range(bases) for column in range(rank)]
    rows = [lambdas[row, base] * a[row, 0, :short] * gammas[base] for row in range(rank) for base in range(bases)]
    product = sum((torch.outer(x, y) for x, y in zip(columns, rows, strict=True)), torch.zeros(long, short).double())
    return scale * (product if shape == (long, short) else product.T)


@few
@given(
    layers_of(),
    st.integers(1, 9),
    st.integers(0, 2**40),
    numbers(0.1, 90),
    st.sampled_from(["", "sparse", "very_sparse"]),
)
def test_the_update_is_a_sum_of_scaled_random_bases(
    model: nn.Sequential, rank: int, seed: int, alpha: float, kind: str
) -> None:
    method = RandLoRA(rank=rank, alpha=alpha, seed=seed, **({kind: True} if kind else {}))
    shapes = [tuple(layer.weight.flatten(1).shape) for layer in model]
    short, long = sorted(max(shape[side] for shape in shapes) for side in (0, 1))
    bases = math.ceil(short / rank)
    try:
        patch = adapters.inject(model, method)
    except TargetError as error:  # Of a few values, as sparse ones are, all are the same now and then.
        assert (kind or rank == short == 1) and "choose another seed, or a larger rank" in str(error)
        return
    for place, shape in zip(patch.attachments, shapes, strict=True):
        branch = place.branch
        tensors = [getattr(branch, f"randlora_{name}").detach() for name in ("lambda", "gamma", "A", "B")]
        lambdas, gammas, a, b = tensors
        assert a.shape == (rank, 1, short) and b.shape == (long, bases, rank)
        for base in (a, b):
            assert base.numel() < 9 or abs(base.std() - 1) < 0.05  # Of values of three digits.
            values = base.unique()
            assert not kind or (values / values.abs().max()).round(decimals=5).abs().sum() in (0, 1, 2)
        used = math.ceil(min(shape) / rank)
        assert lambdas.shape == (rank, used) and gammas.shape == (used, min(shape))
        assert not lambdas.any() and torch.allclose(gammas, torch.tensor(1 / max(gammas.shape)).double())
        assert not delta_of(branch).any()
        lambdas.normal_()
        gammas.normal_()
        torch.testing.assert_close(delta_of(branch), update(alpha / rank, *tensors, shape), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (7, 7)])
@pytest.mark.parametrize("rank", [1, 2, 7])
def test_the_update_can_have_full_rank(shape: tuple[int, int], rank: int) -> None:
    patch = adapters.inject(nn.Sequential(nn.Linear(*shape)).double(), RandLoRA(rank=rank))
    (place,) = patch.attachments
    with torch.no_grad():
        place.branch.randlora_lambda.normal_()
        place.branch.randlora_gamma.normal_()
    assert torch.linalg.matrix_rank(delta_of(place.branch)) == min(shape)


@pytest.mark.parametrize(("settings", "share"), [({"sparse": True}, 1 / 3), ({"very_sparse": True}, 0.1)])
def test_how_many_values_are_not_zero(settings: dict[str, Any], share: float) -> None:
    patch = adapters.inject(nn.Sequential(nn.Linear(100, 200)), RandLoRA(rank=20, **settings))
    for name in ("A", "B"):
        base = getattr(patch.attachments[0].branch, f"randlora_{name}")
        assert abs((base != 0).float().mean() - share) < 0.03 and abs((base > 0).float().mean() - share / 2) < 0.03


def test_a_base_of_zeros_is_refused() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TargetError, match="a base of RandLoRA are all equal at rank=1 and seed=0: choose another"):
        adapters.inject(model, RandLoRA(rank=1, sparse=True))
    with pytest.raises(TargetError, match="all equal at rank=1"):
        adapters.inject(nn.Sequential(nn.Linear(1, 5)), RandLoRA(rank=1))
    assert type(model[0]) is nn.Linear


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(AdapterError, match="a rank that is an integer of 1 or more, not -1"):
        RandLoRA(rank=-1)
    with pytest.raises(AdapterError, match="an alpha that is a finite number, not nan"):
        RandLoRA(alpha=float("nan"))
    with pytest.raises(AdapterError, match=r"a seed that is an integer, not 1\.5"):
        RandLoRA(seed=1.5)
    with pytest.raises(AdapterError, match="sparse to be true or false, not 2"):
        RandLoRA(sparse=2)
    assert RandLoRA(rank=3, alpha=None).scaling == 1
