"""FourierFT, against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adapters
from adapters import AdapterError, FourierFT, TargetError
from tests.adapters.methods.closed_form import delta_of, few, layers_of, numbers


@few
@given(layers_of(), st.integers(1, 5), st.integers(0, 2**40), numbers(-200, 200))
def test_the_update_is_a_sum_of_waves(model: nn.Sequential, frequencies: int, seed: int, scaling: float) -> None:
    frequencies = min(frequencies, *(layer.weight.numel() for layer in model))
    patch = adapters.inject(model, FourierFT(n_frequency=frequencies, seed=seed, scaling=scaling))
    for place in patch.attachments:
        branch, (outputs, inputs) = place.branch, place.branch.matrix.shape
        assert not delta_of(branch).any()
        spectrum = branch.fourierft_spectrum.detach().normal_()
        assert branch.positions.unique().numel() == len(spectrum) == frequencies
        expected = torch.zeros(outputs, inputs, dtype=torch.float64)
        rows, columns = torch.meshgrid(torch.arange(outputs), torch.arange(inputs), indexing="ij")
        for value, position in zip(spectrum, branch.positions.tolist(), strict=True):
            u, v = divmod(position, inputs)
            wave = torch.cos(2 * math.pi * (u * rows / outputs + v * columns / inputs).double())
            expected += scaling * value * wave / (outputs * inputs)
        torch.testing.assert_close(delta_of(branch), expected, rtol=1e-4, atol=1e-4)


def test_layers_of_one_shape_have_the_same_positions() -> None:
    patch = adapters.inject(nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8)), FourierFT(n_frequency=9))
    first, second, third = (place.branch.positions for place in patch.attachments)
    assert torch.equal(first, third) and torch.equal(first, second)  # As many entries, in another matrix.
    again = adapters.inject(nn.Sequential(nn.Linear(6, 8)), FourierFT(n_frequency=9, seed=1))
    assert not torch.equal(again.attachments[0].branch.positions, first)


def test_more_frequencies_than_there_are_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(TargetError, match=r"^0 has 12 Fourier coefficients, 3 × 4, fewer than n_frequency=13"):
        adapters.inject(model, FourierFT(n_frequency=13))
    adapters.inject(model, FourierFT(n_frequency=12))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(AdapterError, match="n_frequency to be an integer of 1 or more, not 0"):
        FourierFT(n_frequency=0)
    with pytest.raises(AdapterError, match="scaling to be a finite number, not 'much'"):
        FourierFT(scaling="much")
