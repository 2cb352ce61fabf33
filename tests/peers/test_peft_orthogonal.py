"""Where PEFT 0.21's OFT, BOFT and HRA go wrong, and what happens here instead."""

from __future__ import annotations

import copy
import types
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft_layer
from torch import Tensor, nn

import adapters
from adapters import BOFT, HRA, OFT


class Net(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def wrapped(base: nn.Module, kind: Any, **settings: Any) -> nn.Module:
    with warnings.catch_warnings(action="ignore"):
        model = peft.get_peft_model(copy.deepcopy(base), kind(target_modules=["layer"], **settings))
    return model.double().eval()


def perturb(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)


def saved(model: nn.Module, path: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):
        model.save_pretrained(path)
    return path


CONVS: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3, "padding": 1},
    "dilated": {"kernel_size": 3, "dilation": 2},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "oblong": {"kernel_size": (3, 2)},
    "padded on one side": {"kernel_size": 3, "padding": (1, 0)},
    "same": {"kernel_size": 3, "padding": "same"},
    "grouped": {"kernel_size": 3, "groups": 2},
}


def conv(name: str) -> tuple[nn.Module, Tensor]:
    return Net(nn.Conv2d(4, 6, **CONVS[name])).double(), torch.randn(2, 4, 7, 7).double()


@torch.no_grad()
def test_oft_of_a_convolution(tmp_path: Path) -> None:
    """PEFT rotates patches of the input and adds them up again where they overlap, which is an input of other values:
    it is not the identity at the start, nor what its merged weights compute. Those are right, and the same as here."""
    base, x = conv("plain")
    theirs = wrapped(base, peft.OFTConfig, oft_block_size=3)
    assert (theirs(x) - base(x)).abs().max() > 1
    perturb(theirs)
    folder = saved(theirs, tmp_path)
    unmerged = theirs(x)
    theirs.merge_adapter()
    assert (theirs(x) - unmerged).abs().max() > 1
    ours = copy.deepcopy(base)
    adapters.load(ours, folder)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-8)
    started = copy.deepcopy(base)
    adapters.inject(started, OFT(block_size=3))
    torch.testing.assert_close(started(x), base(x), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("kind", ["oft", "boft", "hra"])
def test_convolutions_of_any_geometry(name: str, kind: str) -> None:
    """PEFT refuses groups and dilation, crashes for oblong kernels and uneven padding, or computes a plain convolution
    whatever the padding mode. Here it is the convolution of that geometry with another weight."""
    base, x = conv(name)
    config, settings, method = {
        "oft": (peft.OFTConfig, {"oft_block_size": 3}, OFT(block_size=3)),
        "boft": (peft.BOFTConfig, {"boft_block_size": 3}, BOFT(block_size=3)),
        "hra": (peft.HRAConfig, {"r": 4}, HRA(rank=4)),
    }[kind]
    try:
        theirs = wrapped(base, config, **settings)
        fault = not torch.allclose(theirs(x), base(x), rtol=1e-3, atol=1e-3)
    except (ValueError, RuntimeError, NotImplementedError):
        fault = True
    assert fault == (kind == "oft" or name != "plain")
    model = copy.deepcopy(base)
    patch = adapters.inject(model, method)
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)
    perturb(model)
    tensors = {key.removeprefix("layer."): tensor for key, tensor in patch.state_dict().items()}
    weight = {"oft": rotated_by_oft, "boft": rotated_by_boft, "hra": reflected}[kind](base.layer.weight, tensors)
    expected = torch.func.functional_call(base, {"layer.weight": weight}, (x,))
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def rotated_by_oft(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    blocks = []
    for a, b, c in tensors["oft_R"].tolist():
        q = torch.tensor([[0, a, b], [-a, 0, c], [-b, -c, 0]], dtype=torch.float64)
        q2 = q @ q
        blocks.append(torch.eye(3).double() + 2 * q + 2 * q2 + 2 * q2 @ q + q2 @ q2)
    return (weight.flatten(1) @ torch.block_diag(*blocks).T).view_as(weight)


def rotated_by_boft(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    identity = torch.eye(3).double()
    q = [(a - a.T) / 2 for a in tensors["boft_R"][0]]
    r = torch.block_diag(*((identity - one) @ (identity + one).inverse() for one in q))
    return (tensors["boft_s"].view(-1, 1) * (weight.flatten(1) @ r.T)).view_as(weight)


def reflected(weight: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    matrix = weight.flatten(1)
    for u in tensors["hra_u"].T:
        matrix = matrix - 2 * torch.outer(matrix @ u, u) / (u @ u)
    return matrix.view_as(weight)


@torch.no_grad()
@pytest.mark.parametrize(("inputs", "asked", "made"), [(6, 32, 6), (6, 4, 3), (10, 4, 5)])
def test_blocks_that_peft_made_to_fit(inputs: int, asked: int, made: int, tmp_path: Path) -> None:
    """PEFT takes another size if the blocks do not come out even, and leaves the one that was asked for in the file."""
    base, x = Net(nn.Linear(inputs, 8)).double(), torch.randn(3, inputs).double()
    theirs = wrapped(base, peft.OFTConfig, oft_block_size=asked)
    perturb(theirs)
    ours = copy.deepcopy(base)
    patch = adapters.load(ours, saved(theirs, tmp_path / "theirs"))
    assert patch.attachments[0].branch.method.block_size == made
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-8)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), patch.save_pretrained(tmp_path / "ours")).double()
    torch.testing.assert_close(again(x), theirs(x), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_blocks_are_counted_before_they_are_made_to_fit(tmp_path: Path) -> None:
    """The same for a number of blocks: 4 are asked for, 3 are made of 6 inputs."""
    base, x = Net(nn.Linear(6, 8)).double(), torch.randn(3, 6).double()
    theirs = wrapped(base, peft.OFTConfig, oft_block_size=0, r=4)
    perturb(theirs)
    ours = copy.deepcopy(base)
    adapters.load(ours, saved(theirs, tmp_path))
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_boft_has_the_factors_that_its_tensors_have(tmp_path: Path) -> None:
    """Without a compiler for its kernel PEFT makes one factor whatever it is told, and the file says what it was told.
    What it makes is the same here, and a file from here says how many there are."""
    base, x = Net(nn.Linear(8, 8)).double(), torch.randn(3, 8).double()
    theirs = wrapped(base, peft.BOFTConfig, boft_block_size=2, boft_n_butterfly_factor=2)
    perturb(theirs)
    ours = copy.deepcopy(base)
    patch = adapters.load(ours, saved(theirs, tmp_path))
    assert patch.attachments[0].branch.method == BOFT(block_size=2, factors=1)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-8, atol=1e-8)


@torch.no_grad()
@pytest.mark.parametrize(("size", "factors"), [(2, 2), (4, 2), (2, 3), (4, 3)])
@pytest.mark.parametrize("layer", [nn.Linear(16, 6), nn.Conv2d(4, 6, 2)], ids=["linear", "conv"])
def test_boft_of_several_factors(
    size: int, factors: int, layer: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's own permutations, with its kernel, which needs CUDA, replaced by what it computes."""
    kernel = types.SimpleNamespace(forward=lambda blocks: [torch.stack([torch.block_diag(*row) for row in blocks])])
    monkeypatch.setattr(boft_layer, "_FBD_CUDA", kernel)
    base = Net(layer).double()
    x = torch.randn(3, 16) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 5, 5)
    theirs = wrapped(base, peft.BOFTConfig, boft_block_size=size, boft_n_butterfly_factor=factors)
    perturb(theirs)
    folder, expected = saved(theirs, tmp_path / "theirs"), theirs(x.double())
    ours = copy.deepcopy(base)
    patch = adapters.load(ours, folder)
    assert patch.attachments[0].branch.method.factors == factors
    torch.testing.assert_close(ours(x.double()), expected, rtol=1e-8, atol=1e-8)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), patch.save_pretrained(tmp_path / "ours")).double()
    torch.testing.assert_close(again(x.double()), expected, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_orthogonal_reflections_start_as_something() -> None:
    """PEFT starts with pairs of equal vectors, which it then makes orthogonal to each other: what is left of the second
    of each is rounding noise, made a vector of length 1, or nothing, divided by its length. Neither is the identity,
    which no such reflections are. Here the vectors start at random."""
    base, x = Net(nn.Linear(6, 8)).double(), torch.randn(3, 6).double()
    broken = 0
    for seed in range(20):
        torch.default_generator.manual_seed(seed)
        output = wrapped(base, peft.HRAConfig, r=4, apply_GS=True)(x)
        assert not torch.allclose(output, base(x), rtol=0.1, atol=0.1)
        broken += bool(output.isnan().all())
        model = copy.deepcopy(base)
        adapters.inject(model, HRA(rank=4, gram_schmidt=True))
        assert model(x).isfinite().all()
    assert broken
