"""SHiRA, against its formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import adapters
from adapters import AdapterError, SHiRA, TargetError
from tests.adapters.methods.closed_form import delta_of, few, layers_of


@few
@given(layers_of(2), st.integers(1, 3), st.none() | st.integers(0, 2**40))
def test_the_update_has_values_at_the_positions_only(model: nn.Sequential, rank: int, seed: int | None) -> None:
    shapes = [layer.weight.flatten(1).shape for layer in model]
    assume(all(rank * sum(shape) <= shape.numel() for shape in shapes))
    patch = adapters.inject(model, SHiRA(rank=rank, seed=seed))
    for place, shape in zip(patch.attachments, shapes, strict=True):
        branch = place.branch
        assert not delta_of(branch).any()
        values = branch.shira_weight.detach().normal_()
        assert values.shape == (rank * sum(shape),)
        assert branch.shira_indices.dtype == torch.int32 and branch.shira_indices.shape == (2, len(values))
        assert {name for name, _ in branch.named_parameters()} == {"shira_weight"}
        expected = torch.zeros(shape, dtype=torch.float64)
        for value, (row, column) in zip(values, branch.shira_indices.T.tolist(), strict=True):
            assert not expected[row, column]
            expected[row, column] = value
        torch.testing.assert_close(delta_of(branch), expected, rtol=1e-9, atol=1e-9)


def test_layers_have_entries_of_their_own_unless_there_is_a_seed() -> None:
    def indices(seed: int | None, of_inject: int | None) -> list[torch.Tensor]:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        patch = adapters.inject(model, SHiRA(rank=1, seed=seed), seed=of_inject)
        return [place.branch.shira_indices for place in patch.attachments]

    first, second = indices(3, None)
    assert torch.equal(first, second) and torch.equal(first, indices(3, 9)[0])
    first, second = indices(None, 5)
    assert not torch.equal(first, second)
    assert torch.equal(first, indices(None, 5)[0]) and not torch.equal(first, indices(None, 6)[0])


def test_more_entries_than_there_are_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TargetError, match=r"^0 has 16 entries, 4 × 4, and rank=3 asks for 24: give it a smaller rank"):
        adapters.inject(model, SHiRA(rank=3))
    adapters.inject(model, SHiRA(rank=2))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(AdapterError, match="a rank that is an integer of 1 or more, not 0"):
        SHiRA(rank=0)
    with pytest.raises(AdapterError, match="a seed that is an integer or None, not 'x'"):
        SHiRA(seed="x")
