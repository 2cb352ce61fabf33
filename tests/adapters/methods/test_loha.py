"""LoHa is what its paper says, written out in loops, whatever the numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import AdapterError, DoHa, DoKr, LoHa, LoKr, Method
from tests.adapters.models import perturb

few = st.integers(1, 5)
strengths = st.none() | st.floats(-3, 3).filter(lambda alpha: abs(alpha) > 0.1)


def update(t: dict[str, Tensor], shape: torch.Size) -> Tensor:
    """The product of two matrices, each a sum over ranks, number by number; `shape` is that of the weight."""
    parts = []
    for number in "12":
        a, b, core = t[f"hada_w{number}_a"], t[f"hada_w{number}_b"], t.get(f"hada_t{number}")
        part = torch.zeros(shape, dtype=torch.float64)
        for o in range(shape[0]):
            for p in range(len(b)):
                if core is None:
                    part[o] += a[o, p] * b[p].view(shape[1:])
                else:
                    part[o] += a[p, o] * sum(torch.tensordot(b[q], core[p, q], dims=0) for q in range(len(b)))
        parts.append(part)
    return parts[0] * parts[1]


def check(layer: nn.Module, method: LoHa, cores: bool) -> None:
    layer = layer.double()
    model = nn.Sequential(layer)
    weight = layer.weight.detach().clone()
    patch = adapters.inject(model, method)
    patch.merge()
    assert torch.equal(layer.weight, weight)
    patch.unmerge()
    perturb(patch)
    t = {name: tensor.detach() for name, tensor in patch.attachments[0].branch.tensors().items()}
    assert ("hada_t1" in t) == ("hada_t2" in t) == cores
    assert len(t["hada_w1_b"]) == len(t["hada_w2_b"]) == method.rank
    patch.merge()
    scale = 1.0 if method.alpha is None else method.alpha / method.rank
    torch.testing.assert_close(layer.weight.detach(), weight + scale * update(t, weight.shape), rtol=1e-10, atol=1e-10)


@given(few, few, few, strengths, st.booleans())
@settings(max_examples=20)
def test_of_a_linear_layer(inputs: int, outputs: int, rank: int, alpha: float | None, tucker: bool) -> None:
    check(nn.Linear(inputs, outputs), LoHa(rank, alpha, tucker), cores=False)


@given(few, few, few, st.sampled_from([1, 2, (1, 1), (3, 2), (1, 3), (2, 1, 2)]), few, strengths, st.booleans())
@settings(max_examples=30)
def test_of_a_convolution(
    inputs: int, outputs: int, groups: int, kernel: Any, rank: int, alpha: float | None, tucker: bool
) -> None:
    sizes = kernel if isinstance(kernel, tuple) else (kernel,)
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(sizes) - 1]
    layer = conv(inputs * groups, outputs * groups, kernel, groups=groups)
    check(layer, LoHa(rank, alpha, tucker), cores=tucker and max(sizes) > 1)


def test_its_rank_is_up_to_the_square() -> None:
    torch.default_generator.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 12, bias=False)).double()
    weight = model[0].weight.detach().clone()
    patch = adapters.inject(model, LoHa(rank=3))
    perturb(patch)
    patch.merge()
    assert torch.linalg.matrix_rank(model[0].weight - weight) == 9


@pytest.mark.parametrize(
    ("decomposed", "plain"),
    [
        (DoHa(rank=2, alpha=3), LoHa(rank=2, alpha=3)),
        (DoHa(rank=2, tucker=True), LoHa(rank=2, tucker=True)),
        (DoKr(rank=1, alpha=3), LoKr(rank=1, alpha=3)),
    ],
)
@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 4), lambda: nn.Conv2d(6, 4, (3, 2)), lambda: nn.Conv1d(4, 6, 3)])
@torch.no_grad()
def test_a_decomposed_weight_has_the_directions_of_the_plain_update(
    decomposed: Method, plain: Method, make: Any
) -> None:
    model = nn.Sequential(make()).double()
    weight = model[0].weight.clone()
    patch = adapters.inject(model, decomposed)
    lengths = patch.attachments[0].branch.dora_scale
    torch.testing.assert_close(lengths.flatten(), torch.stack([row.norm() for row in weight]))
    assert lengths.shape == (len(weight), *[1] * (weight.ndim - 1))
    perturb(patch)
    other = adapters.inject(model, plain, name="plain")
    for name, tensor in other.attachments[0].branch.named_parameters():
        tensor.copy_(dict(patch.attachments[0].branch.named_parameters())[name])
    with adapters.use(model, "plain"):
        rows = model[0].weight
    with adapters.use(model, "default"):
        found = model[0].weight
    expected = torch.stack([length * row / row.norm() for length, row in zip(lengths.flatten(), rows, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"rank": 0}, "LoHa needs a rank that is an integer of 1 or more, not 0"),
        ({"rank": 1.5}, "not 1.5"),
        ({"alpha": float("inf")}, "an alpha that is a finite number, not inf"),
        ({"alpha": "1"}, "an alpha that is a finite number, not '1'"),
    ],
)
def test_numbers_that_are_out_of_range(numbers: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        LoHa(**numbers)
