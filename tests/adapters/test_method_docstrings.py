"""The examples in the docstrings of the methods, and of the classes that a method of one's own is made of."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapters
import fluxion as fl
from adapters.methods.core.decomposed import WeightDecomposed
from adapters.methods.core.method import Method
from tests.docstrings import has_example, run_example

CLASSES = [*adapters.METHODS.values(), Method, adapters.Branch, adapters.Tensors, adapters.WeightSpec]


class Block(nn.Module):
    """Layers under the names that the examples have."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 16)
        self.norm = nn.LayerNorm(16)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(16, 16) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        self.head = nn.Linear(16, 32)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.embed(tokens))
        return self.head(self.mlp(self.q_proj(x) + self.k_proj(x) + self.v_proj(x)))


def language_model() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config)


@pytest.mark.parametrize("thing", [*CLASSES, adapters.register], ids=lambda thing: thing.__name__)
def test_an_example_runs(thing: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert has_example(thing)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(adapters.METHODS, "_methods", dict(adapters.METHODS))
    model = language_model() if getattr(thing, "whole_model", "") else Block()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    run_example(thing, {"torch": torch, "nn": nn, "fl": fl, "adapters": adapters, "Tensor": Tensor, "model": model})
    for patch in adapters.patches(model).values():
        patch.eject()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for path in tmp_path.iterdir():
        adapters.load(model, path)


@pytest.mark.parametrize("method", adapters.METHODS.values(), ids=lambda method: method.__name__)
def test_every_hyperparameter_is_documented(method: type[Method]) -> None:
    text = "\n".join(
        inspect.getdoc(kind) or ""
        for kind in (*method.__mro__, *([method.adds] if issubclass(method, WeightDecomposed) else []))
    )
    names = inspect.signature(method).parameters
    assert not [name for name in names if f"{name}:" not in text and f"`{name}`" not in text]
