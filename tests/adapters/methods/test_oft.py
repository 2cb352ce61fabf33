"""OFT by its formula: rotations written out block by block."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import OFT, AdapterError, DiagOFT, TargetError

sizes = st.integers(2, 5)
counts = st.integers(1, 4)
seeds = st.integers(0, 2**16)


def noise(*shape: int, std: float = 0.3) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * std


def skew_from(upper: Tensor, size: int) -> Tensor:
    q, values = torch.zeros(size, size, dtype=torch.float64), iter(upper.tolist())
    for row in range(size):
        for column in range(row + 1, size):
            q[row, column] = next(values)
            q[column, row] = -q[row, column]
    return q


def series(q: Tensor, terms: int) -> Tensor:
    """`I + 2 Q + ... + 2 Qⁿ⁻¹ + Qⁿ`."""
    if terms == 2:
        return torch.eye(len(q)).double() + 2 * q
    last = max(terms - 1, 3)
    factors = [1.0, *[2.0] * (last - 1), 1.0]
    return sum(factor * torch.linalg.matrix_power(q, n) for n, factor in enumerate(factors))


def exact(q: Tensor) -> Tensor:
    identity = torch.eye(len(q)).double()
    return (identity - q) @ (identity + q).inverse()


def merged_weight(patch: adapters.Patch, model: nn.Module) -> Tensor:
    """What the weight has become, by merging."""
    patch.merge()
    weight = model[0].weight.detach().clone()
    patch.unmerge()
    return weight


@settings(max_examples=25)
@given(sizes, counts, st.integers(2, 7), st.booleans(), st.booleans(), st.booleans(), st.booleans(), seeds)
def test_oft_rotates_inputs(
    size: int, count: int, terms: int, neumann: bool, share: bool, coft: bool, by_number: bool, seed: int
) -> None:
    torch.default_generator.manual_seed(seed)
    numbers: dict[str, Any] = {"blocks": count} if by_number else {"block_size": size}
    method = OFT(**numbers, block_share=share, coft=coft, eps=0.3, cayley_neumann=neumann, num_terms=terms)
    model = nn.Sequential(nn.Linear(size * count, 3)).double()
    x, base = noise(4, size * count, std=1.0), model[0]
    expected_start = model(x)
    patch = adapters.inject(model, method)
    torch.testing.assert_close(model(x), expected_start, rtol=1e-12, atol=1e-12)
    upper = noise(1 if share else count, size * (size - 1) // 2)
    patch.load_state_dict({"0.oft_R": upper})
    blocks = []
    for row in upper:
        q = skew_from(row, size)
        bound = 0.3 / math.sqrt(len(upper))
        if coft and q.norm() > bound:
            q = q * bound / q.norm()
        blocks.append(series(q, terms) if neumann else exact(q))
    r = torch.block_diag(*(blocks * count if share else blocks))
    expected = x @ r @ base.weight.T + base.bias
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(merged_weight(patch, model), base.weight @ r.T, rtol=1e-10, atol=1e-10)


@settings(max_examples=10)
@given(st.integers(1, 3), st.sampled_from([1, 2]), seeds)
def test_oft_of_convolutions_rotates_each_patch_of_the_input(channels: int, groups: int, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(2 * channels * groups, 4, (3, 2), groups=groups, dilation=2)).double()
    x, base = noise(2, 2 * channels * groups, 7, 6, std=1.0), model[0]
    patch = adapters.inject(model, OFT(block_size=4, cayley_neumann=False))
    upper = noise(channels * 3, 6)
    patch.load_state_dict({"0.oft_R": upper})
    r = torch.block_diag(*(exact(skew_from(row, 4)) for row in upper))
    weight = (base.weight.flatten(1) @ r.T).view_as(base.weight)
    expected = nn.functional.conv2d(x, weight, base.bias, groups=groups, dilation=2)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_oft_of_an_embedding_rotates_what_is_looked_up() -> None:
    model, x = nn.Sequential(nn.Embedding(7, 6)).double(), torch.tensor([[1, 3], [0, 6]])
    patch = adapters.inject(model, OFT(block_size=3))
    upper = noise(2, 3)
    patch.load_state_dict({"0.oft_R": upper})
    r = torch.block_diag(*(series(skew_from(row, 3), 5) for row in upper))
    torch.testing.assert_close(model(x), model[0].base.weight[x] @ r, rtol=1e-10, atol=1e-10)


def test_rotations_keep_lengths_and_the_series_comes_near_to_them() -> None:
    """The exact R turns the other way, as PEFT has it."""
    upper = noise(3, 6, std=0.02)
    exactly = OFT(cayley_neumann=False).rotations(upper)
    identity = torch.eye(4).double().expand(3, 4, 4)
    torch.testing.assert_close(exactly @ exactly.mT, identity, rtol=1e-12, atol=1e-12)
    errors = [(OFT(num_terms=terms).rotations(upper) - exactly.mT).abs().max() for terms in (2, 4, 6, 8)]
    assert errors == sorted(errors, reverse=True) and errors[0] > 1e-4 and errors[-1] < 1e-8


@settings(max_examples=25)
@given(sizes, counts, st.booleans(), st.sampled_from([0.0, 0.01, 100.0]), st.booleans(), seeds)
def test_diag_oft_rotates_outputs(
    size: int, count: int, rescale: bool, constraint: float, convolution: bool, seed: int
) -> None:
    torch.default_generator.manual_seed(seed)
    outputs = size * count
    layer = nn.Conv2d(3, outputs, 2) if convolution else nn.Linear(4, outputs)
    model = nn.Sequential(layer).double()
    x = noise(2, 3, 4, 4, std=1.0) if convolution else noise(3, 4, std=1.0)
    start = model(x)
    patch = adapters.inject(model, DiagOFT(block_size=size, rescale=rescale, constraint=constraint))
    torch.testing.assert_close(model(x), start, rtol=1e-12, atol=1e-12)
    blocks = noise(count, size, size)
    factor = 1 + noise(outputs, *[1] * (layer.weight.ndim - 1))
    patch.load_state_dict({"0.oft_blocks": blocks, **({"0.rescale": factor} if rescale else {})})
    q = [block - block.T for block in blocks]
    norm = torch.stack(q).norm()
    if constraint and norm > constraint * outputs:
        q = [block * constraint * outputs / norm for block in q]
    rows = torch.block_diag(*map(exact, q)) @ layer.weight.flatten(1)  # Rᵀ has the other sign of Q.
    weight = rows.view_as(layer.weight) * (factor if rescale else 1)
    expected = torch.func.functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("method", "numbers", "message"),
    [
        (OFT, {"block_size": 4, "blocks": 2}, "either a block_size or a number of blocks, not (4, 2)"),
        (OFT, {"block_size": -1}, "an integer for block_size or blocks, not (-1, 0)"),
        (OFT, {"blocks": 1.5}, "an integer for block_size or blocks, not (0, 1.5)"),
        (OFT, {"eps": 0.0}, "an eps of more than 0, not 0.0"),
        (OFT, {"num_terms": 1}, "a num_terms that is an integer of 2 or more, not 1"),
        (DiagOFT, {"constraint": -0.1}, "a constraint of 0 or more, not -0.1"),
        (DiagOFT, {"block_size": 2, "blocks": 2}, "either a block_size or a number of blocks, not (2, 2)"),
    ],
)
def test_numbers_out_of_range_are_refused(method: type[adapters.Method], numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)):
        method(**numbers)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (OFT(), "0 has 6 features to rotate, which cannot be cut by block_size=32 into equal blocks of 2 or more"),
        (
            OFT(blocks=6),
            "cannot be cut by blocks=6 into equal blocks of 2 or more: choose another divisor of 6, or exclude it",
        ),
        (OFT(block_size=1), "cannot be cut by block_size=1 into equal blocks of 2 or more"),
        (DiagOFT(block_size=4), "0 has 10 features to rotate, which cannot be cut by block_size=4 into equal blocks"),
    ],
)
def test_blocks_that_do_not_come_out_even_are_refused(method: adapters.Method, message: str) -> None:
    model = nn.Sequential(nn.Linear(6, 10))
    with pytest.raises(TargetError, match=re.escape(message)):
        adapters.inject(model, method)
    assert not adapters.patches(model) and type(model[0]) is nn.Linear
