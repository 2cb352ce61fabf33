"""`TrainableTokens` replaces rows, where they are looked up and where they are scored, and copies no embedding."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import adapters
from adapters import AdapterError, LoRA, Patch, TrainableTokens
from tests.adapters.models import snapshot


class Tied(nn.Module):
    """A language model of an embedding and a head that share their weight."""

    def __init__(self, rows: int = 9, bias: bool = False, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(rows, 4)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, rows, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.embed(x)).tanh())


def perturbed(patch: Patch) -> Patch:
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_()
    return patch


TOKENS = st.lists(st.integers(0, 8), min_size=1, max_size=9, unique=True)


@given(TOKENS, st.floats(-2, 2), st.booleans(), st.booleans())
def test_closed_form(tokens: list[int], scale: float, bias: bool, tied: bool) -> None:
    model, x = Tied(bias=bias, tied=tied).double(), torch.randint(0, 9, (3, 5))
    base = model(x)
    weights = [model.embed.weight.detach().clone(), model.head.weight.detach().clone()]
    patch = adapters.inject(model, TrainableTokens(tuple(tokens)), scale=scale)
    torch.testing.assert_close(model(x), base, rtol=1e-12, atol=1e-12)
    perturbed(patch)
    (rows,) = patch.parameters()
    for weight in weights[: 1 + tied]:
        for number, token in enumerate(tokens):
            weight[token] = (1 - scale) * weight[token] + scale * rows[number].detach()
    hidden = model.middle(F.embedding(x, weights[0])).tanh()
    expected = F.linear(hidden, weights[1], model.head.bias)
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    patch.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
def test_beside_other_adapters(bias: bool) -> None:
    """In any order with a LoRA at the same layers, merged or not, what is computed is the same."""
    x = torch.randint(0, 9, (3, 5))
    for order in itertools.permutations(["lora", "tokens", "head"]):
        model = Tied(bias=bias).double()
        methods = {
            "lora": (LoRA(rank=2), "embed"),
            "head": (LoRA(rank=2, bias=True), "head"),
            "tokens": (TrainableTokens((3, 1, 7)), None),
        }
        patches = [perturbed(adapters.inject(model, *methods[name], name=name)) for name in order]
        expected = model(x)
        for patch in patches:
            patch.merge()
            torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_tied_weights_stay_tied() -> None:
    model, x = Tied(), torch.randint(0, 9, (3, 5))
    before = snapshot(model)
    patch = perturbed(adapters.inject(model, TrainableTokens((3, 1))))
    assert list(patch.targets) == ["embed", "head"] and patch.num_parameters() == 2 * 4
    expected = model(x)
    patch.merge()
    assert model.embed.base.weight is model.head.base.weight
    torch.testing.assert_close(model(x), expected)
    patch.eject()
    assert snapshot(model) == before
    patch.inject()
    patch.merge_and_eject()
    assert model.embed.weight is model.head.weight and type(model.head) is nn.Linear
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_file_has_the_rows_once(trainable: bool, tmp_path: Path) -> None:
    model, x = Tied(), torch.randint(0, 9, (3, 5))
    patch = perturbed(adapters.inject(model, TrainableTokens((3, 1))))
    expected = model(x)
    assert list(patch.adapter_file().layers) == ["embed"]
    patch.save_pretrained(tmp_path)
    patch.eject()
    loaded = adapters.load(model, tmp_path, trainable=trainable)
    assert list(loaded.targets) == ["embed", "head"] and loaded.num_parameters() == 2 * 4
    torch.testing.assert_close(model(x), expected)
    loaded.merge()
    assert model.embed.base.weight is model.head.base.weight


class Largest(TorchDispatchMode):
    """The largest tensor that is made, views aside."""

    size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {value.untyped_storage().data_ptr() for value in args if isinstance(value, Tensor)}
        if isinstance(made, Tensor) and made.untyped_storage().data_ptr() not in given:
            self.size = max(self.size, made.numel())
        return made


def test_no_embedding_is_copied() -> None:
    model, x = Tied(10_000), torch.randint(0, 10_000, (1, 2))
    perturbed(adapters.inject(model, TrainableTokens((3, 1))))
    with torch.no_grad(), Largest() as largest:
        model(x)
    assert largest.size == 2 * 10_000  # The scores of two positions.


def test_only_the_rows_learn() -> None:
    model, x = Tied(), torch.tensor([[3, 4]])
    patch = perturbed(adapters.inject(model, TrainableTokens((3, 1))))
    model(x).square().sum().backward()
    (rows,) = patch.parameters()
    assert rows.grad is not None and rows.grad.all()
    assert all(parameter.grad is None for parameter in model.parameters() if parameter is not rows)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    model, x = Tied(bias=True), torch.randint(0, 9, (3, 5))
    perturbed(adapters.inject(model, TrainableTokens((3, 1))))
    expected = model(x)
    with torch.autocast("cpu", dtype=dtype):
        torch.testing.assert_close(model(x).float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("tokens", [(), (-1,), (1.0,), (True,), 3, "12"])
def test_tokens_are_checked(tokens: Any) -> None:
    with pytest.raises(AdapterError, match="TrainableTokens needs tokens that are numbers of 0 or more, not"):
        TrainableTokens(tokens)


def test_a_token_is_named_once() -> None:
    with pytest.raises(AdapterError, match=r"needs tokens that are each named once, not \(1, 1\)"):
        TrainableTokens((1, 1))
