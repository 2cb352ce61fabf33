"""VB-LoRA, against its formula written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import AdapterError, TargetError, VBLoRA
from tests.adapters.methods.closed_form import delta_of, few, layers_of


def piece(logits: Tensor, bank: Tensor, topk: int) -> Tensor:
    """The vectors of the largest logits, weighted by what the softmax of these alone gives."""
    largest = sorted(range(len(logits)), key=lambda index: -float(logits[index]))[:topk]
    weights = [math.exp(float(logits[index])) for index in largest]
    return sum(weight / sum(weights) * bank[index] for weight, index in zip(weights, largest, strict=True))


@st.composite
def cases(draw: st.DrawFn) -> tuple[nn.Sequential, VBLoRA]:
    length, count = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    topk, rank = draw(st.integers(1, count)), draw(st.integers(1, 4))
    return draw(layers_of(length)), VBLoRA(rank=rank, num_vectors=count, vector_length=length, topk=topk)


@few
@given(cases())
def test_the_factors_are_put_together_of_mixtures_of_the_bank(case: tuple[nn.Sequential, VBLoRA]) -> None:
    model, method = case
    patch = adapters.inject(model, method)
    for place in patch.attachments:
        branch, (outputs, inputs), length = place.branch, place.branch.matrix.shape, method.vector_length
        a, b, bank = (getattr(branch, f"vblora_{name}").detach() for name in ("logits_A", "logits_B", "vector_bank"))
        assert a.shape == (method.rank, inputs // length, method.num_vectors)
        assert b.shape == (outputs // length, method.rank, method.num_vectors)
        for tensor in (a, b, bank):
            tensor.normal_()
        rows = [torch.cat([piece(logits, bank, method.topk) for logits in row]) for row in a]
        columns = [torch.cat([piece(tile[k], bank, method.topk) for tile in b]) for k in range(method.rank)]
        expected = sum(torch.outer(column, row) for column, row in zip(columns, rows, strict=True))
        torch.testing.assert_close(delta_of(branch), expected, rtol=1e-9, atol=1e-9)


def test_it_starts_small() -> None:
    patch = adapters.inject(nn.Sequential(nn.Linear(8, 6)).double(), VBLoRA(rank=3, vector_length=2))
    delta = delta_of(patch.attachments[0].branch)
    assert delta.any() and delta.abs().max() <= 3 * 0.02**2
    assert 0.09 < patch.attachments[0].branch.vblora_logits_A.std() < 0.11


def test_layers_that_pieces_do_not_fit_are_refused() -> None:
    for layer in (nn.Linear(4, 6), nn.Linear(6, 4)):
        with pytest.raises(TargetError, match=r"^0 is \d × \d, not multiples of vector_length=3: choose a length"):
            adapters.inject(nn.Sequential(layer), VBLoRA(vector_length=3))


def test_without_logits_there_is_nothing_to_train() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TargetError, match="cannot be trained: it was saved for inference, with save_only_topk_weights"):
        adapters.inject(model, VBLoRA(vector_length=2, only_topk=True))


def test_numbers_out_of_range_are_refused() -> None:
    with pytest.raises(AdapterError, match="vector_length to be an integer of 1 or more, not 0"):
        VBLoRA(vector_length=0)
    with pytest.raises(AdapterError, match=r"a topk of at most num_vectors=4, not 5\."):
        VBLoRA(num_vectors=4, topk=5)
    with pytest.raises(AdapterError, match=r"num_vectors to be an integer of 1 or more, not 2\.5"):
        VBLoRA(num_vectors=2.5)
