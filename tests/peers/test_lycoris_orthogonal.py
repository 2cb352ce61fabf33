"""The rotations of the real LyCORIS: what its tensors compute there, they compute here.

LyCORIS inverts in single precision, so outputs agree to that.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lycoris.modules.boft import ButterflyOFTModule
from lycoris.modules.diag_oft import DiagOFTModule
from torch import nn

import adapters
import weights

KEYS = {DiagOFTModule: "diag-oft", ButterflyOFTModule: "output-boft"}
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 16), (3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), (3, 6)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3), (2, 4, 7)),
    "conv2d": (lambda: nn.Conv2d(4, 8, 3, padding=1, stride=2), (2, 4, 7, 7)),
    "dilated conv2d": (lambda: nn.Conv2d(4, 8, (3, 2), dilation=2, groups=2), (2, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 8, 2), (2, 2, 3, 3, 3)),
}


def perturbed(kind: Any, layer: nn.Module, **options: Any) -> nn.Module:
    module = kind("layer", layer, **options).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return module


def loaded(module: nn.Module, layer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, adapters.Patch]:
    """A model of that layer with the tensors of a module of LyCORIS."""
    state = dict(module.state_dict())
    alpha, blocks = float(state.pop("alpha")), state["oft_blocks"]
    numbers = {"block_size": blocks.shape[-1], "constraint": alpha, "rescale": "rescale" in state}
    if blocks.ndim == 4:
        numbers["factors"] = blocks.shape[0]
    file = weights.AdapterFile({"0": weights.LayerWeights(KEYS[type(module)], numbers, state)})
    monkeypatch.setattr(weights, "read_adapter", lambda source, revision=None: file)
    model = nn.Sequential(copy.deepcopy(layer))
    return model, adapters.load(model, "file")


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("rank", [2, 4])
@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("constraint", [0.0, 0.02, 10.0])
def test_outputs_are_the_same(
    name: str, kind: Any, rank: int, rescaled: bool, constraint: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    module = perturbed(kind, layer, lora_dim=rank, rescaled=rescaled, constraint=constraint)
    model, patch = loaded(module, layer, monkeypatch)
    expected = module(x)
    assert not torch.allclose(expected, layer(x), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model[0].weight, module.get_merged_weight()[0], rtol=1e-5, atol=1e-5)
    patch.merge()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KEYS)
def test_the_bias_stays_as_it_is(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `bypass_mode`, which it sets itself for quantised layers, LyCORIS turns the output with the bias in it:
    not what it computes otherwise of the same tensors, nor what its merged weights do. Without a bias they agree."""
    x = torch.randn(3, 6)
    for bias in (False, True):
        layer = nn.Linear(6, 8, bias=bias)
        module = perturbed(kind, layer, rescaled=True)
        model, _ = loaded(module, layer, monkeypatch)
        torch.testing.assert_close(model(x), module(x), rtol=1e-5, atol=1e-5)
        module.bypass_mode = True
        assert torch.allclose(module(x), model(x), rtol=1e-4, atol=1e-4) != bias


@torch.no_grad()
def test_strength_0_is_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    """LyCORIS leaves the factors of `rescale` in, at whatever strength."""
    layer, x = nn.Linear(6, 8), torch.randn(3, 6)
    module = perturbed(DiagOFTModule, layer, rescaled=True)
    model, patch = loaded(module, layer, monkeypatch)
    module.multiplier = patch.scale = 0.0
    assert (module(x) - layer(x)).abs().max() > 0.1
    assert torch.equal(model(x), layer(x))
