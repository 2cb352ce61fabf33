"""GLoRA against its formula, in both of the forms it has."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import adapters
from adapters import AdapterError, GLoRA, LycorisGLoRA, Patch, TargetError
from tests.adapters.models import perturb


def full(patch: Patch, letter: str, shape: tuple[int, ...]) -> Tensor:
    """One of A to E in its full shape."""
    found = {name.rpartition("_")[2]: p.detach() for name, p in patch.named_parameters() if f"_{letter}_" in name}
    if found.keys() == {"Xd", "Xu"}:
        return torch.einsum("or,ri->oi", found["Xd"], found["Xu"])
    return found.get("X", torch.zeros((), dtype=torch.float64)).expand(shape)


@pytest.mark.parametrize(
    "configs",
    itertools.product(
        ["lora", "vector", "constant", "none"], ["lora", "vector", "none"], ["vector", "constant", "none"]
    ),
    ids=lambda configs: "-".join(configs),
)
def test_linear(configs: tuple[str, str, str]) -> None:
    base = nn.Linear(4, 5).double()
    model, x = nn.Sequential(base), torch.randn(3, 4).double()
    for bias in (True, False):
        base.bias = base.bias if bias else None
        if "none" in configs[0] and (not bias or configs == ("none", "none", "none")):
            continue  # Nothing to train: see below.
        patch = adapters.inject(model, GLoRA(2, *configs), scale=0.7)
        torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)
        perturb(patch, std=1.0)
        a, b, c = full(patch, "A", (5, 4)), full(patch, "B", (5, 4)), full(patch, "C", (4, 1))
        d, e = full(patch, "D", (5,)), full(patch, "E", (5,))
        assert bias or not any(f"_{letter}_" in name for letter in "CDE" for name, _ in patch.named_parameters())
        weight = base.weight + 0.7 * (base.weight * a + b)
        shift = base.bias + 0.7 * (base.bias * d + e + torch.einsum("oi,ij->o", base.weight, c)) if bias else None
        torch.testing.assert_close(model(x), F.linear(x, weight, shift), rtol=1e-12, atol=1e-12)
        patch.eject()


@settings(max_examples=20)
@given(st.integers(1, 4), st.sampled_from([1, 2]), st.integers(1, 3))
def test_convolution(rank: int, groups: int, height: int) -> None:
    base = nn.Conv2d(4, 6, (height, 2), groups=groups).double()
    model, x = nn.Sequential(base), torch.randn(2, 4, 5, 6).double()
    patch = adapters.inject(model, GLoRA(rank, config_d_e="vector"))
    perturb(patch, std=1.0)
    matrix = base.weight.flatten(1)
    a, b, c = full(patch, "A", matrix.shape), full(patch, "B", matrix.shape), full(patch, "C", (matrix.shape[1], 1))
    weight = (matrix + matrix * a + b).view_as(base.weight)
    bias = base.bias + base.bias * full(patch, "D", (6,)) + full(patch, "E", (6,)) + (matrix @ c)[:, 0]
    torch.testing.assert_close(model(x), F.conv2d(x, weight, bias, groups=groups), rtol=1e-11, atol=1e-11)


@settings(max_examples=20)
@given(st.integers(1, 4), st.floats(0.1, 5), st.sampled_from([1, 2]), st.integers(0, 2))
def test_lycoris(rank: int, alpha: float, groups: int, dimensions: int) -> None:
    kernel, ones = (2, 3)[:dimensions], (1, 1)[:dimensions]
    layers: list[Any] = [
        nn.Linear(4, 6),
        nn.Conv1d(4, 6, kernel, groups=groups),
        nn.Conv2d(4, 6, kernel, groups=groups),
    ]
    base = layers[dimensions].double()
    model, x = nn.Sequential(base), torch.randn(2, 4, *(5, 6)[:dimensions]).double()
    patch = adapters.inject(model, LycorisGLoRA(rank, alpha))
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)
    perturb(patch, std=1.0)
    a1, a2, b1, b2 = (patch.state_dict()[f"0.{name}"] for name in ("a1", "a2", "b1", "b2"))
    channels = base.weight.shape[1]
    assert a1.shape == (channels, rank, *ones) and a2.shape == (rank, channels, *ones)
    assert b1.shape == (6, rank, *ones) and b2.shape == (rank, channels, *kernel)
    a = torch.einsum("ir,rj->ij", a1.flatten(1), a2.flatten(1))
    b = torch.einsum("or,ri...->oi...", b1.flatten(1), b2)
    weight = base.weight + alpha / rank * (torch.einsum("oi...,ij->oj...", base.weight, a) + b)
    expected = torch.func.functional_call(base, {"weight": weight, "bias": base.bias}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "options", [{"rank": 0}, {"config_a_b": "full"}, {"config_c": "constant"}, {"config_d_e": "lora"}]
)
def test_bad_numbers(options: dict[str, object]) -> None:
    with pytest.raises(AdapterError, match=f"GLoRA needs a {next(iter(options))}"):
        GLoRA(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"rank": 0}, {"alpha": "1"}])
def test_bad_numbers_of_lycoris(options: dict[str, object]) -> None:
    with pytest.raises(AdapterError, match=f"LycorisGLoRA needs an? {next(iter(options))}"):
        LycorisGLoRA(**options)  # type: ignore[arg-type]


def test_nothing_to_train_is_refused() -> None:
    """What is left of the paper's five tensors may be none, as of those for a bias where there is none."""
    for layer, method in (
        (nn.Linear(2, 3, bias=False), GLoRA(config_a_b="none")),
        (nn.Linear(2, 3), GLoRA(config_a_b="none", config_c="none", config_d_e="none")),
    ):
        model = nn.Sequential(layer)
        with pytest.raises(TargetError, match=r"has nothing to train at 0: exclude it"):
            adapters.inject(model, method)
        assert model[0] is layer
