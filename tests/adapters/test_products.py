"""Products are added to weights of fewer bits with one rounding, whichever unit of the processor does it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters import LoRA
from adapters.lowrank import accumulate as products
from adapters.lowrank.accumulate import add
from adapters.lowrank.low_rank import LowRank

LAYERS = {"linear": nn.Linear(160, 96), "embedding": nn.Embedding(96, 160), "convolution": nn.Conv2d(32, 96, 3)}


@pytest.fixture(autouse=True, params=[False, True], ids=["in float32", "in bfloat16"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether bfloat16 is taken to be multiplied in hardware. Where it is not, the same comes out, only later."""
    monkeypatch.setattr(products, "MATRIX_UNIT", request.param)
    monkeypatch.setattr(products, "_BLOCK", 1 << 12)  # These weights are small, and are to be in several parts.


def assert_rounded_once(found: Tensor, exact: Tensor, terms: Tensor | float = 20.0) -> None:
    """To half a step of what a number is stored in, and little more than one of float32 of the terms that it sums."""
    half = torch.finfo(found.dtype).eps / 2
    assert ((found.double() - exact).abs() <= half * exact.abs() + 2**-22 * terms).all()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(1,), (16,), (3, 8, 5)])
def test_merging(kind: str, dtype: torch.dtype, ranks: tuple[int, ...]) -> None:
    model = nn.Sequential(copy.deepcopy(LAYERS[kind])).to(dtype)
    weight = model[0].weight
    torch.default_generator.manual_seed(0)
    patches = [adapters.inject(model, LoRA(rank=rank), name=str(rank), scale=0.1 * rank - 0.7) for rank in ranks]
    for patch in patches:
        for parameter in patch.parameters():
            parameter.data = torch.randn(parameter.shape)  # In more bits than those of the weight.
    exact = copy.deepcopy(model).double()[0].weight
    for patch in patches:
        patch.merge()
    assert_rounded_once(model[0].base.weight, exact)
    for patch in patches:
        patch.unmerge()
    assert model[0].base.weight is weight
    if len(patches) == 1:
        patches[0].merge_and_eject()
        assert_rounded_once(weight, exact)


@pytest.mark.parametrize("rank", [1, 4, 33])
def test_stacks_and_parts_of_them(rank: int) -> None:
    weight = torch.randn(4, 96, 160).bfloat16()
    updates = [LowRank(torch.randn(4, 96, rank), torch.randn(4, rank, 160), scale) for scale in (0.3, -1.7)]
    exact, terms = weight.double(), weight.double().abs()
    for update in updates:
        up, down, scale = update.up.double(), update.down.double(), update.scale
        exact = exact + scale * up @ down
        terms = terms + abs(scale) * up.abs() @ down.abs()
    made = [products.in_bfloat16(updates)] if products.MATRIX_UNIT else updates
    add(weight[:1], made)
    add(weight[1:], made, first=1)
    assert_rounded_once(weight, exact, terms)
