"""GraLoRA, against its formula written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adapters
from adapters import AdapterError, GraLoRA, TargetError
from tests.adapters.methods.closed_form import delta_of, few, layers_of, numbers


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Sequential, GraLoRA]:
    blocks, part, hybrid = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(0, 2))
    alpha = draw(numbers(-9, 9))
    return draw(layers_of(blocks)), GraLoRA(rank=blocks * part, alpha=alpha, blocks=blocks, hybrid_rank=hybrid)


@few
@given(cases())
def test_each_block_has_factors_of_its_own(case: tuple[nn.Sequential, GraLoRA]) -> None:
    model, method = case
    blocks, part = method.blocks, method.rank // method.blocks
    patch = adapters.inject(model, method)
    for place in patch.attachments:
        branch, (outputs, inputs) = place.branch, place.branch.matrix.shape
        width, height = inputs // blocks, outputs // blocks
        assert not delta_of(branch).any()
        tensors = {name: tensor.detach().normal_() for name, tensor in branch.named_parameters()}
        a, b = tensors["gralora_A"], tensors["gralora_B"]
        assert a.shape == (blocks, width, method.rank) and b.shape == (blocks, method.rank, height)
        expected = torch.zeros(outputs, inputs, dtype=torch.float64)
        for i in range(blocks):
            for j in range(blocks):
                down = a[j][:, i * part : (i + 1) * part].T
                up = b[i][j * part : (j + 1) * part].T
                expected[i * height : (i + 1) * height, j * width : (j + 1) * width] = up @ down
        if method.hybrid_rank:
            expected += tensors["gralora_B_general"] @ tensors["gralora_A_general"]
        expected *= method.alpha / (method.rank + method.hybrid_rank)
        torch.testing.assert_close(delta_of(branch), expected, rtol=1e-9, atol=1e-9)


def test_as_many_parameters_as_lora_and_a_higher_rank() -> None:
    model = nn.Sequential(nn.Linear(16, 32)).double()
    patch = adapters.inject(model, GraLoRA(rank=4, blocks=4))
    assert patch.num_parameters() == 4 * (16 + 32)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_()
    assert torch.linalg.matrix_rank(delta_of(patch.attachments[0].branch)) == 16


def test_layers_that_blocks_do_not_fit_are_refused() -> None:
    for layer in (nn.Linear(4, 6), nn.Linear(6, 4)):
        with pytest.raises(TargetError, match=r"^0 is \d × \d, not multiples of blocks=3: choose a number that"):
            adapters.inject(nn.Sequential(layer), GraLoRA(rank=3, blocks=3))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(AdapterError, match=r"a rank that is a multiple of blocks=2, not 3\."):
        GraLoRA(rank=3)
    with pytest.raises(AdapterError, match="blocks to be an integer of 1 or more, not 0"):
        GraLoRA(blocks=0)
    with pytest.raises(AdapterError, match="a hybrid_rank that is an integer of 0 or more, not -1"):
        GraLoRA(hybrid_rank=-1)
