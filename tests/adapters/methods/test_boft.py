"""BOFT by its formula: each factor written out as a matrix, feature by feature."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import BOFT, AdapterError, OutputBOFT, TargetError

seeds = st.integers(0, 2**16)


def noise(*shape: int, std: float = 0.3) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * std


def exact(q: Tensor) -> Tensor:
    identity = torch.eye(len(q)).double()
    return (identity - q) @ (identity + q).inverse()


def members(level: int, block: int, size: int, in_turn: bool) -> list[int]:
    """The features of a block: two runs of half its size, `2 ** level` runs apart."""
    if level == 0 and not in_turn:
        return list(range(block * size, (block + 1) * size))
    apart, half = 2**level, size // 2
    first = block // apart * 2 * apart + block % apart
    runs = [[run * half + i for i in range(half)] for run in (first, first + apart)]
    return [feature for pair in zip(*runs, strict=True) for feature in pair] if in_turn else runs[0] + runs[1]


def factor(level: int, blocks: list[Tensor], in_turn: bool) -> Tensor:
    size = len(blocks[0])
    matrix = torch.zeros(size * len(blocks), size * len(blocks), dtype=torch.float64)
    for number, block in enumerate(blocks):
        features = members(level, number, size, in_turn)
        for i, row in enumerate(features):
            for j, column in enumerate(features):
                matrix[row, column] = block[i, j]
    return matrix


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.booleans(), st.booleans(), seeds)
def test_boft_rotates_inputs(
    factors: int, half: int, groups: int, convolution: bool, by_number: bool, seed: int
) -> None:
    torch.default_generator.manual_seed(seed)
    count, size = groups * 2 ** (factors - 1), 2 * half
    numbers = {"blocks": count} if by_number else {"block_size": size}
    layer = nn.Conv1d(count * half, 3, 2) if convolution else nn.Linear(count * size, 3)
    model = nn.Sequential(layer).double()
    x = noise(2, count * half, 5, std=1.0) if convolution else noise(4, count * size, std=1.0)
    start = model(x)
    patch = adapters.inject(model, BOFT(**numbers, factors=factors))
    torch.testing.assert_close(model(x), start, rtol=1e-12, atol=1e-12)
    a, s = noise(factors, count, size, size), 1 + noise(3)
    patch.load_state_dict({"0.boft_R": a, "0.boft_s": s.view(1, 3) if convolution else s.view(3, 1)})
    rotation = torch.eye(count * size).double()
    for level in range(factors):
        rotation = factor(level, [exact((b - b.T) / 2) for b in a[level]], False) @ rotation
    weight = s.view(3, 1) * (layer.weight.flatten(1) @ rotation.T)
    expected = torch.func.functional_call(layer, {"weight": weight.view_as(layer.weight)}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=25)
@given(
    st.integers(0, 3),
    st.integers(1, 2),
    st.integers(2, 3),
    st.booleans(),
    st.sampled_from([0.0, 0.01]),
    st.booleans(),
    seeds,
)
def test_output_boft_rotates_outputs(
    factors: int, half: int, levels: int, rescale: bool, constraint: float, convolution: bool, seed: int
) -> None:
    torch.default_generator.manual_seed(seed)
    count, size = 2 ** (levels - 1), 2 * half
    outputs, factors = count * size, min(factors, levels)
    layer = nn.Conv2d(3, outputs, 2) if convolution else nn.Linear(4, outputs)
    model = nn.Sequential(layer).double()
    x = noise(2, 3, 4, 4, std=1.0) if convolution else noise(3, 4, std=1.0)
    start = model(x)
    patch = adapters.inject(model, OutputBOFT(size, factors=factors, rescale=rescale, constraint=constraint))
    torch.testing.assert_close(model(x), start, rtol=1e-12, atol=1e-12)
    b, s = noise(factors or levels, count, size, size), 1 + noise(outputs, *[1] * (layer.weight.ndim - 1))
    patch.load_state_dict({"0.oft_blocks": b, **({"0.rescale": s} if rescale else {})})
    q = b - b.mT
    if constraint and q.norm() > constraint * outputs:
        q = q * constraint * outputs / q.norm()
    rows = layer.weight.flatten(1)
    for level in range(len(b)):
        rows = factor(level, [exact(-one) for one in q[level]], True) @ rows
    weight = rows.view_as(layer.weight) * (s if rescale else 1)
    expected = torch.func.functional_call(layer, {"weight": weight}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_every_feature_comes_to_act_on_every_other() -> None:
    model = nn.Sequential(nn.Linear(16, 16, bias=False)).double()
    nn.init.eye_(model[0].weight)
    for method in (BOFT(block_size=4, factors=3), OutputBOFT(block_size=4)):
        patch = adapters.inject(model, method)
        with torch.no_grad():
            for parameter in patch.parameters():
                parameter.add_(torch.randn_like(parameter))
        turned = model(torch.eye(16).double())
        assert turned.abs().min() > 1e-9
        patch.eject()


@pytest.mark.parametrize(
    ("method", "numbers", "message"),
    [
        (BOFT, {"block_size": 4, "blocks": 2}, "either a block_size or a number of blocks, not (4, 2)"),
        (BOFT, {"factors": 0}, "a number of factors that is an integer of 1 or more, not 0"),
        (OutputBOFT, {"factors": -1}, "a number of factors that is an integer of 0 or more, not -1"),
        (OutputBOFT, {"constraint": float("nan")}, "a constraint of 0 or more, not nan"),
    ],
)
def test_numbers_out_of_range_are_refused(method: type[adapters.Method], numbers: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterError, match=re.escape(message)):
        method(**numbers)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (BOFT(block_size=5), "0 has 12 features to rotate, which cannot be cut by block_size=5"),
        (BOFT(block_size=3, factors=2), "0 has 4 blocks of 3, too few or of an odd size for 2 factors"),
        (BOFT(block_size=2, factors=3), "0 has 6 blocks of 2, too few or of an odd size for 3 factors"),
        (OutputBOFT(block_size=4), "0 has 10 features to rotate, which cannot be cut by block_size=4"),
        (OutputBOFT(block_size=2, factors=2), "0 has 5 blocks of 2, too few or of an odd size for 2 factors"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(method: adapters.Method, message: str) -> None:
    model = nn.Sequential(nn.Linear(12, 10))
    with pytest.raises(TargetError, match=re.escape(message)):
        adapters.inject(model, method)
    assert not adapters.patches(model) and type(model[0]) is nn.Linear
