"""LoKr is what its paper says, written out in loops, whatever the numbers."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import AdapterError, LoKr, TargetError
from tests.adapters.models import perturb, snapshot

few = st.integers(1, 4)
sizes = st.integers(1, 12)
strengths = st.none() | st.floats(-3, 3).filter(lambda alpha: abs(alpha) > 0.1)
factors = st.just(-1) | st.integers(1, 6)


def update(t: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """Each number of the first factor times the second factor, block by block; `shape` is that of the weight."""
    first = t["lokr_w1"] if "lokr_w1" in t else torch.einsum("rp,pc->rc", t["lokr_w1_a"], t["lokr_w1_b"])
    rows, columns = shape[0] // first.shape[0], shape[1] // first.shape[1]
    if "lokr_w2" in t:
        second = t["lokr_w2"]
    elif "lokr_t2" in t:
        second = torch.einsum("pr,qc,pq...->rc...", t["lokr_w2_a"], t["lokr_w2_b"], t["lokr_t2"])
    else:
        second = torch.einsum("rp,pc->rc", t["lokr_w2_a"], t["lokr_w2_b"]).view(rows, columns, *shape[2:])
    whole = torch.zeros(shape, dtype=torch.float64)
    for row, column in itertools.product(*map(range, first.shape)):
        whole[row * rows : (row + 1) * rows, column * columns : (column + 1) * columns] = first[row, column] * second
    return whole


def check(layer: nn.Module, x: Tensor, method: LoKr) -> dict[str, Tensor]:
    layer, x = layer.double(), x.double()
    model = nn.Sequential(layer)
    weight, base = layer.weight.detach().clone(), model(x)
    patch = adapters.inject(model, method)
    torch.testing.assert_close(model(x), base, rtol=0, atol=1e-12)
    perturb(patch)
    beside = model(x)
    t = {name: tensor.detach() for name, tensor in patch.attachments[0].branch.tensors().items()}
    patch.merge()
    torch.testing.assert_close(model(x), beside, rtol=1e-10, atol=1e-10)
    scale = 1.0 if method.alpha is None else method.alpha / method.rank
    torch.testing.assert_close(layer.weight.detach(), weight + scale * update(t, weight.shape), rtol=1e-10, atol=1e-10)
    return t


@given(sizes, sizes, few, strengths, factors, st.booleans(), st.booleans())
@settings(max_examples=50)
def test_of_a_linear_layer(
    inputs: int, outputs: int, rank: int, alpha: float | None, factor: int, both: bool, tucker: bool
) -> None:
    t = check(nn.Linear(inputs, outputs), torch.randn(3, 2, inputs), LoKr(rank, alpha, factor, both, tucker))
    assert "lokr_t2" not in t and (both or "lokr_w1" in t)


@given(
    few,
    few,
    few,
    st.sampled_from([1, 2, (1, 1), (3, 2), (2, 1, 2)]),
    few,
    strengths,
    factors,
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=50)
def test_of_a_convolution(
    inputs: int,
    outputs: int,
    groups: int,
    kernel: Any,
    rank: int,
    alpha: float | None,
    factor: int,
    both: bool,
    tucker: bool,
) -> None:
    shape = kernel if isinstance(kernel, tuple) else (kernel,)
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(shape) - 1]
    x = torch.randn(2, inputs * groups, *[4] * len(shape))
    layer = conv(inputs * groups, outputs * groups, kernel, groups=groups)
    t = check(layer, x, LoKr(rank, alpha, factor, both, tucker))
    assert ("lokr_t2" in t) == (tucker and max(shape) > 1 and "lokr_w2" not in t)


@pytest.mark.parametrize(
    ("options", "shapes"),
    [
        ({"rank": 1}, {"w1": (4, 3), "w2_a": (6, 1), "w2_b": (1, 4)}),
        ({"rank": 3}, {"w1": (4, 3), "w2": (6, 4)}),
        ({"rank": 1, "factor": 2}, {"w1": (2, 2), "w2_a": (12, 1), "w2_b": (1, 6)}),
        ({"rank": 1, "factor": 5}, {"w1": (4, 3), "w2_a": (6, 1), "w2_b": (1, 4)}),
        ({"rank": 1, "factor": 12}, {"w1": (12, 12), "w2": (2, 1)}),
        ({"rank": 1, "factor": 12, "decompose_both": True}, {"w1_a": (12, 1), "w1_b": (1, 12), "w2": (2, 1)}),
        ({"rank": 1, "factor": (3, 6)}, {"w1": (3, 6), "w2_a": (8, 1), "w2_b": (1, 2)}),
    ],
)
def test_the_shapes_of_the_factors(options: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    patch = adapters.inject(nn.Sequential(nn.Linear(12, 24)), LoKr(**options))
    tensors = patch.attachments[0].branch.tensors()
    assert {name.removeprefix("lokr_"): tuple(tensor.shape) for name, tensor in tensors.items()} == shapes


def test_factors_that_do_not_divide_a_weight_are_refused() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.Conv2d(6, 8, 3))
    before = snapshot(model)
    for target, factor in (("0", (3, 4)), ("0", (4, 5)), ("1", (2, 9))):
        with pytest.raises(TargetError, match=rf"^{target} has 8 outputs and \d+ inputs, which .* with factor=-1"):
            adapters.inject(model, LoKr(factor=factor), target)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"rank": 0}, "LoKr needs a rank that is an integer of 1 or more, not 0"),
        ({"alpha": float("nan")}, "an alpha that is a finite number, not nan"),
        ({"factor": 0}, "a factor that is -1, an integer of 1 or more, or a tuple of two of these, not 0"),
        ({"factor": -2}, "not -2"),
        ({"factor": 1.5}, "not 1.5"),
        ({"factor": (2, 0)}, r"not \(2, 0\)"),
        ({"factor": (-1, 2)}, r"not \(-1, 2\)"),
        ({"factor": (2, 2, 2)}, r"not \(2, 2, 2\)"),
    ],
)
def test_numbers_that_are_out_of_range(numbers: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        LoKr(**numbers)
