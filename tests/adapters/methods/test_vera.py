"""VeRA, against its formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adapters
from adapters import AdapterError, VeRA
from tests.adapters.methods.closed_form import delta_of, few, layers_of, numbers


@few
@given(layers_of(), st.integers(1, 9), st.integers(0, 2**40), numbers(0.05, 2))
def test_the_update_is_a_product_of_slices_of_two_random_matrices(
    model: nn.Sequential, rank: int, seed: int, d_initial: float
) -> None:
    patch = adapters.inject(model, VeRA(rank=rank, seed=seed, d_initial=d_initial))
    outputs, inputs = (max(layer.weight.flatten(1).shape[side] for layer in patch.targets.values()) for side in (0, 1))
    generator = torch.Generator().manual_seed(seed)
    # Kaiming's uniform distribution for a linear layer before a ReLU: within √(6 / inputs).
    a = ((torch.rand(rank, inputs, generator=generator) * 2 - 1) * (6 / inputs) ** 0.5).double()
    b = ((torch.rand(outputs, rank, generator=generator) * 2 - 1) * (6 / rank) ** 0.5).double()
    for place in patch.attachments:
        branch = place.branch
        torch.testing.assert_close(branch.vera_A.detach(), a, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(branch.vera_B.detach(), b, rtol=1e-5, atol=1e-5)
        assert not branch.vera_lambda_b.any() and (branch.vera_lambda_d == d_initial).all()
        assert not delta_of(branch).any()
        with torch.no_grad():
            branch.vera_lambda_b.normal_()
            branch.vera_lambda_d.normal_()
        expected = sum(
            d * torch.outer(branch.vera_lambda_b * branch.vera_B[: branch.matrix.shape[0], k], row)
            for k, (d, row) in enumerate(
                zip(branch.vera_lambda_d, branch.vera_A[:, : branch.matrix.shape[1]], strict=True)
            )
        )
        torch.testing.assert_close(delta_of(branch), expected.detach(), rtol=1e-9, atol=1e-9)


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(AdapterError, match="a rank that is an integer of 1 or more, not 0"):
        VeRA(rank=0)
    with pytest.raises(AdapterError, match="a seed that is an integer, not 'x'"):
        VeRA(seed="x")
    with pytest.raises(AdapterError, match="d_initial to be a finite number, not inf"):
        VeRA(d_initial=float("inf"))
