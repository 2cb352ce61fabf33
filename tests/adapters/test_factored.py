"""Low-rank updates nearest to matrices, against torch's decompositions of whole matrices."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adapters
from adapters.lowrank.low_rank import LowRank
from adapters.lowrank.svd import nearest


def decaying(outputs: int, inputs: int, decay: float, *stack: int) -> Tensor:
    """A matrix whose singular values are the powers of a number."""
    size = min(outputs, inputs)
    left = torch.linalg.qr(torch.randn(*stack, outputs, size, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(*stack, inputs, size, dtype=torch.float64)).Q
    return (left * decay ** torch.arange(size, dtype=torch.float64)) @ right.mT


def best(matrix: Tensor, rank: int) -> float:
    """The least error there is (Eckart and Young)."""
    singular = torch.linalg.svdvals(matrix)
    return float(singular[..., rank:].norm() / singular.norm())


def off(matrix: Tensor, update: LowRank) -> float:
    return float((update.matrix() - matrix).norm() / matrix.norm())


@settings(max_examples=30)
@given(
    outputs=st.integers(1, 60),
    inputs=st.integers(1, 60),
    rank=st.integers(1, 20),
    decay=st.floats(0.3, 0.95),
    seed=st.integers(0, 99),
)
def test_a_rank(outputs: int, inputs: int, rank: int, decay: float, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    matrix = decaying(outputs, inputs, decay)
    update = nearest(matrix, rank=rank, generator=torch.Generator().manual_seed(seed))
    assert update.shape == (outputs, inputs)
    assert update.rank <= rank
    assert off(matrix, update) <= best(matrix, min(rank, outputs, inputs)) * 1.01 + 1e-9


@pytest.mark.parametrize("stack", [(), (3,)])
@pytest.mark.parametrize(("outputs", "inputs"), [(300, 200), (150, 400)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_an_energy_is_kept_by_about_the_least_rank(
    stack: tuple[int, ...], outputs: int, inputs: int, energy: float
) -> None:
    matrix = decaying(outputs, inputs, 0.9, *stack)
    update = nearest(matrix, energy=energy, generator=torch.Generator().manual_seed(0))
    kept = 1 - off(matrix, update) ** 2
    assert kept >= energy - 1e-9
    singular = torch.linalg.svdvals(matrix).square()
    shares = singular.cumsum(-1) / singular.sum(-1, keepdim=True)
    # Exact values are decomposed as far as rounding goes, and no further.
    least = int((shares < min(energy, 1 - 1e-14)).sum(-1).max()) + 1
    assert least - 1 <= update.rank <= least + 1 if energy < 1 else update.rank <= min(outputs, inputs)


@pytest.mark.parametrize("shape", [(120, 80), (80, 120), (3, 60, 60)])
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 0.99999, 1.0])
def test_noise_takes_many_columns_and_no_more_than_it_needs(shape: tuple[int, ...], energy: float) -> None:
    """What tuning of all weights leaves: no singular value is small."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    if len(shape) == 3:
        matrix[1] = 0.0  # An expert that was not tuned.
    update = nearest(matrix, energy=energy, generator=torch.Generator().manual_seed(0))
    assert update.is_finite()
    kept = 1 - ((update.matrix() - matrix).square().sum((-2, -1)) / matrix.square().sum((-2, -1)).clamp(min=1e-9))
    assert float(kept.min()) >= energy - 1e-6
    singular = torch.linalg.svdvals(matrix.double()).square()
    shares = singular.cumsum(-1) / singular.sum(-1, keepdim=True).clamp(min=1e-9)
    least = int((shares < energy - 1e-9).sum(-1)[singular[..., 0] > 0].max()) + 1
    assert update.rank in (least, least + 1)


def test_a_rank_goes_before_an_energy() -> None:
    matrix = decaying(200, 200, 0.99)
    update = nearest(matrix, rank=7, energy=0.99, generator=torch.Generator().manual_seed(0))
    assert update.rank == 7
    update = nearest(matrix, rank=150, energy=0.5, generator=torch.Generator().manual_seed(0))
    assert update.rank < 50


def test_one_seed_gives_the_same_and_leaves_torchs_own_numbers_alone() -> None:
    matrix = decaying(200, 100, 0.9)
    before = torch.get_rng_state()
    one, other = (nearest(matrix, 4, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one.up, other.up)
    assert torch.equal(one.down, other.down)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_low_rank_is_found_exactly() -> None:
    matrix = torch.randn(500, 5, dtype=torch.float64) @ torch.randn(5, 300, dtype=torch.float64)
    for size in ({"rank": 20}, {"energy": 1.0}, {"rank": 5}):
        update = nearest(matrix, **size, generator=torch.Generator().manual_seed(0))
        assert update.rank == 5
        assert off(matrix, update) < 1e-12


def test_reduced_by_energy_is_the_least_rank_that_keeps_it() -> None:
    matrix = torch.diag(torch.tensor([4.0, 2.0, 1.0, 0.5], dtype=torch.float64))  # Energies 16, 4, 1, 0.25 of 21.25.
    for energy, rank in ((0.5, 1), (0.75, 1), (0.76, 2), (0.94, 2), (0.95, 3), (0.99, 4), (1.0, 4)):
        assert LowRank.full(matrix).truncated(energy=energy).rank == rank, energy
    assert math.isclose(LowRank.full(matrix).norm(), math.sqrt(21.25))


def update_of(outputs: int, rank: int, inputs: int, scale: float = 1.0) -> LowRank:
    factors = torch.randn(outputs, rank, dtype=torch.float64), torch.randn(rank, inputs, dtype=torch.float64)
    return LowRank(*factors, scale)


@pytest.mark.parametrize("scales", [(2.0,), (2.0, 2.0), (2.0, -0.5, 1.0)])
def test_a_join_is_the_sum(scales: tuple[float, ...]) -> None:
    updates = [update_of(6, rank, 5, scale) for rank, scale in enumerate(scales, start=1)]
    joined = LowRank.join(updates)
    assert joined.rank == sum(update.rank for update in updates)
    torch.testing.assert_close(joined.matrix(), sum(update.matrix() for update in updates))


def test_norms_and_errors_count_the_scale() -> None:
    one, other = update_of(7, 2, 9, -3.0), update_of(7, 3, 9, 0.25)
    assert math.isclose(one.norm(), float(one.matrix().norm()))
    assert math.isclose(one.error(other), float((one.matrix() - other.matrix()).norm() / other.matrix().norm()))
    assert one.error(other.scaled(0.0)) == 0.0
    torch.testing.assert_close(one.truncated().matrix(), one.matrix())


def test_factors_of_different_ranks_are_refused() -> None:
    with pytest.raises(adapters.LayerMismatchError, match=r"\(4, 2\) and \(3, 5\)"):
        LowRank(torch.zeros(4, 2), torch.zeros(3, 5))
