"""Which layer the names and the shapes in a checkpoint are taken for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import weights
from adapters.files.resolve.path_index import checkpoint_index
from adapters.files.skeleton import Skeleton
from adapters.layers.kinds import Conv1D, is_conv1d
from weights.disk.header import TensorInfo


def shapes(model: nn.Module) -> Skeleton:
    return Skeleton({name: TensorInfo(t.dtype, tuple(t.shape), 0, 0) for name, t in model.state_dict().items()})


def lora(a: tuple[int, ...], name: str = "lora_A") -> list[weights.LayerWeights]:
    return [weights.LayerWeights("lora", {}, {name: torch.zeros(a)})]


LAYERS: dict[str, tuple[nn.Module, list[weights.LayerWeights]]] = {
    "proj": (nn.Linear(3, 4), []),
    "square": (nn.Linear(4, 4), []),
    "one": (nn.Linear(4, 1), []),
    "plain": (nn.Linear(4, 4, bias=False), []),
    "x_embedder": (nn.Linear(4, 6), []),
    "patch_embed": (nn.Linear(4, 6, bias=False), lora((2, 4))),
    "embed_tokens": (nn.Embedding(6, 4), []),
    "wte": (nn.Embedding(6, 4), []),
    "rows": (nn.Embedding(6, 4), lora((2, 6))),
    "table": (nn.Embedding(4, 4), lora((2, 4), "lora_embedding_A")),
    "conv": (nn.Conv2d(2, 4, (3, 2)), []),
    "same": (nn.Conv1d(4, 4, 3), []),
    "deep": (nn.Conv3d(2, 4, 2, bias=False), []),
    "up": (nn.ConvTranspose2d(2, 3, (3, 2)), []),
    "grouped_up": (nn.ConvTranspose1d(4, 6, 3, groups=2), []),
    "norm": (nn.LayerNorm(4), []),
    "norm_of_two": (nn.LayerNorm((3, 4)), []),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    layer, content = LAYERS[name]
    found = shapes(nn.ModuleDict({name: layer, "norms": nn.LayerNorm(2)})).layer(name, (), content)
    assert type(found) is type(layer)
    assert {key: p.shape for key, p in found.named_parameters()} == {
        key: p.shape for key, p in layer.named_parameters()
    }
    assert getattr(found, "groups", 1) == getattr(layer, "groups", 1)


def test_squares_are_as_those_of_the_same_name_and_else_as_all_others() -> None:
    config = GPT2Config(
        n_embd=8, n_layer=1, n_head=2, vocab_size=9, n_positions=8, n_inner=12, add_cross_attention=True
    )
    model = GPT2LMHeadModel(config)
    known = shapes(model)
    for path, layer in model.named_modules():
        if is_conv1d(layer):
            assert isinstance(known.layer(path, (), []), Conv1D), path
    assert isinstance(known.layer("transformer.wte", (), []), nn.Embedding)
    mixed: Any = nn.ModuleDict(
        {"up": nn.ConvTranspose2d(4, 6, 3), "body": nn.Conv2d(6, 4, 3), "same": nn.Conv2d(4, 4, 3)}
    )
    mixed["up_1"] = nn.ModuleDict({"up": nn.ConvTranspose2d(4, 4, 3)})
    assert isinstance(shapes(mixed).layer("same", (), []), nn.Conv2d)
    assert isinstance(shapes(mixed).layer("up_1.up", (), []), nn.ConvTranspose2d)


def test_no_memory_is_taken() -> None:
    info = TensorInfo(torch.float32, (10**6, 10**6), 0, 0)
    layer = Skeleton({"a.weight": info}).layer("a", (), [])
    assert layer.weight.shape == info.shape
    assert layer.weight.untyped_storage().nbytes() == 4


def test_parameters_of_other_names_and_buffers() -> None:
    model = nn.MultiheadAttention(4, 2)
    known = shapes(nn.ModuleDict({"attention": model, "norm": nn.BatchNorm1d(4)}))
    (weight,) = checkpoint_index(known.infos).by_path(flattened=False)["attention.in_proj_weight"]
    assert (weight.module, weight.parameter, weight.rows) == ("attention", "in_proj_weight", 12)
    assert known.layer("attention", (), []).in_proj_weight.shape == (12, 4)
    norm = known.layer("norm", {"running_mean", "running_var", "num_batches_tracked"}, [])
    assert {name for name, _ in norm.named_parameters()} == {"weight", "bias"}
