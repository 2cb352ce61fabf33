"""Files of the real PEFT, of every method on every layer that it supports, load here by themselves; and ours there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapters
import weights
from adapters.methods.lokr import divisor


class Net(nn.Module):
    """One layer that is adapted, and one that is not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def conv(inputs: int, outputs: int, kernel: Any = 3, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(inputs, outputs, kernel, **options)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 8), lambda: torch.randn(4, 3, 6)),
    "linear without bias": (lambda: nn.Linear(6, 8, bias=False), lambda: torch.randn(4, 6)),
    "square linear": (lambda: nn.Linear(8, 8), lambda: torch.randn(4, 8)),
    "transformers conv1d": (lambda: Conv1D(8, 6), lambda: torch.randn(4, 3, 6)),
    "conv": (conv(4, 6, padding=1), lambda: torch.randn(2, 4, 7, 7)),
    "conv of stride 2": (conv(4, 6, stride=2), lambda: torch.randn(2, 4, 7, 7)),
    "conv of dilation 2": (conv(4, 6, dilation=2), lambda: torch.randn(2, 4, 7, 7)),
    "conv of groups 2": (conv(4, 6, groups=2), lambda: torch.randn(2, 4, 7, 7)),
    "oblong conv": (conv(4, 6, (3, 2)), lambda: torch.randn(2, 4, 7, 7)),
    "circular conv": (conv(4, 6, padding=1, padding_mode="circular"), lambda: torch.randn(2, 4, 7, 7)),
    "conv of kernel 1": (conv(4, 6, 1), lambda: torch.randn(2, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), lambda: torch.randn(2, 4, 7)),
    "conv1d of kernel 1": (lambda: nn.Conv1d(4, 6, 1), lambda: torch.randn(2, 4, 7)),
    "embedding": (lambda: nn.Embedding(11, 8), lambda: torch.randint(0, 11, (4, 3))),
}
LINEARS = ("linear", "linear without bias", "square linear")
# What PEFT's adapters on a convolution compute is what they say, whatever the convolution.
CONVOLUTIONS = ("conv", "conv of stride 2", "oblong conv", "conv of kernel 1")


@dataclass
class Case:
    """A configuration of PEFT, and the layers on which it does what it says.

    Attributes:
        config: The configuration, for `target_modules=["layer"]`.
        layers: The names of the layers.
        tolerance: How near the outputs are, relative and absolute: 1e-8 in double precision, or 1e-5 where PEFT
            computes in single precision whatever it is given.
    """

    config: Callable[..., peft.PeftConfig]
    layers: tuple[str, ...]
    tolerance: float = 1e-8


def configured(kind: Callable[..., peft.PeftConfig], **settings: Any) -> Callable[..., peft.PeftConfig]:
    return lambda **more: kind(target_modules=["layer"], **settings, **more)


# LoHa and LoKr take all of the geometry into account besides how the input is padded.
LYCORIS_LAYERS = (
    *LINEARS,
    *CONVOLUTIONS,
    "conv of dilation 2",
    "conv of groups 2",
    "conv1d",
    "conv1d of kernel 1",
)
LORA_LAYERS = (*LINEARS, "transformers conv1d", *CONVOLUTIONS, "embedding")
CASES: dict[str, Case] = {
    "lora": Case(configured(peft.LoraConfig, r=3, lora_alpha=5), LORA_LAYERS),
    "rslora": Case(configured(peft.LoraConfig, r=3, lora_alpha=5, use_rslora=True), LORA_LAYERS),
    "lora with bias": Case(configured(peft.LoraConfig, r=3, lora_alpha=5, lora_bias=True), (*LINEARS[::2], "conv")),
    "lora and biases": Case(configured(peft.LoraConfig, r=3, bias="lora_only"), (*LINEARS, *CONVOLUTIONS)),
    "lora and all biases": Case(configured(peft.LoraConfig, r=3, bias="all"), ("linear", "linear without bias")),
    "loha": Case(configured(peft.LoHaConfig, r=2, alpha=3), LYCORIS_LAYERS),
    # PEFT rounds alpha / r to single precision.
    "loha of another scale": Case(configured(peft.LoHaConfig, r=3, alpha=5), LYCORIS_LAYERS[:1], tolerance=1e-6),
    "loha with cores": Case(configured(peft.LoHaConfig, r=2, alpha=3, use_effective_conv2d=True), LYCORIS_LAYERS),
    "loha of random start": Case(configured(peft.LoHaConfig, r=2, init_weights=False), LYCORIS_LAYERS[:1]),
    "loha trained with dropout": Case(
        configured(peft.LoHaConfig, r=2, rank_dropout=0.5, module_dropout=0.5), LYCORIS_LAYERS[:1]
    ),
    "lokr": Case(configured(peft.LoKrConfig, r=1, alpha=3), LYCORIS_LAYERS),
    "lokr of full factors": Case(
        configured(peft.LoKrConfig, r=8, alpha=3),
        # A Conv1d is tested below.
        tuple(layer for layer in LYCORIS_LAYERS if "conv1d" not in layer),
    ),
    "lokr of factor 2": Case(configured(peft.LoKrConfig, r=1, alpha=3, decompose_factor=2), LYCORIS_LAYERS),
    "lokr of factor 4": Case(configured(peft.LoKrConfig, r=1, alpha=3, decompose_factor=4), LINEARS),
    "lokr of factor 8": Case(configured(peft.LoKrConfig, r=1, alpha=3, decompose_factor=8), LINEARS),
    "lokr of two decomposed factors": Case(
        configured(peft.LoKrConfig, r=1, alpha=3, decompose_both=True, decompose_factor=3), LINEARS
    ),
    "lokr with a core": Case(
        configured(peft.LoKrConfig, r=1, alpha=3, use_effective_conv2d=True, decompose_factor=1), LYCORIS_LAYERS
    ),
    "lokr of another start": Case(configured(peft.LoKrConfig, r=1, init_weights="lycoris"), LYCORIS_LAYERS[:1]),
    "lokr trained with dropout": Case(
        configured(peft.LoKrConfig, r=1, rank_dropout=0.5, module_dropout=0.5, rank_dropout_scale=True), LINEARS[:1]
    ),
    "lora and another layer": Case(configured(peft.LoraConfig, r=3, modules_to_save=["other"]), ("linear",)),
}


# What only says how the layers were chosen and how the tensors were made.
NOT_KEPT = {
    "auto_mapping",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "init_weights",
    "module_dropout",
    "rank_dropout",
    "rank_dropout_scale",
    "target_modules",
}


def parity() -> list[tuple[str, str]]:
    return [(name, layer) for name, case in CASES.items() for layer in case.layers]


@pytest.mark.parametrize(("name", "layer"), parity(), ids=lambda value: value)
def test_files_mean_the_same_there_and_here(name: str, layer: str, tmp_path: Path) -> None:
    case, (make, sample) = CASES[name], LAYERS[layer]
    torch.manual_seed(0)
    base, x = Net(make()).double().eval(), sample()
    x = x.double() if x.is_floating_point() else x
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        theirs = peft.get_peft_model(copy.deepcopy(base), case.config()).double().eval()
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        theirs.save_pretrained(tmp_path / "theirs")
        expected = theirs(x)
        assert not torch.allclose(expected, base(x), rtol=1e-3, atol=1e-3)
        ours = copy.deepcopy(base)
        patch = adapters.load(ours, tmp_path / "theirs")
        torch.testing.assert_close(ours(x), expected, rtol=case.tolerance, atol=case.tolerance)
        patch.save_pretrained(tmp_path / "ours")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").double().eval()
        torch.testing.assert_close(again(x), expected, rtol=case.tolerance, atol=case.tolerance)
        # And what is loaded here can be trained on, merged and taken out.
        patch.merge()
        torch.testing.assert_close(ours(x), expected, rtol=case.tolerance, atol=case.tolerance)
        patch.eject()
        assert torch.equal(ours(x), base(x))


@pytest.mark.parametrize(("name", "layer"), parity(), ids=lambda value: value)
def test_a_file_from_here_has_what_a_file_from_there_has(name: str, layer: str, tmp_path: Path) -> None:
    """The same names and shapes of tensors, and settings that PEFT reads to the same configuration."""
    case, (make, _) = CASES[name], LAYERS[layer]
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(Net(make()), case.config())
        theirs.save_pretrained(tmp_path / "theirs")
        model = Net(make())
        adapters.load(model, tmp_path / "theirs").save_pretrained(tmp_path / "ours")
        one, other = (weights.open(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
        assert {key: tensor.shape for key, tensor in one.items()} == {key: t.shape for key, t in other.items()}
        configs = [peft.PeftConfig.from_pretrained(tmp_path / who).to_dict() for who in ("theirs", "ours")]
    one, other = ({name: value for name, value in config.items() if name not in NOT_KEPT} for config in configs)
    assert one == other


def filled(model: nn.Module, config: peft.PeftConfig, folder: Path) -> nn.Module:
    """A model of PEFT with random numbers in its adapter, and its file."""
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        adapted = peft.get_peft_model(copy.deepcopy(model), config).double().eval()
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        adapted.save_pretrained(folder)
    return adapted


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.LoKrConfig])
@torch.no_grad()
def test_layers_of_several_ranks_and_alphas(kind: type[peft.PeftConfig], tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 6)).double(), torch.randn(3, 6).double()
    config = kind(
        r=8, alpha=4, target_modules=["0", "1", "2"], rank_pattern={"0": 1, "1": 2}, alpha_pattern={r"[0]": 3}
    )
    expected = filled(model, config, tmp_path / "theirs")(x)
    patch = adapters.load(model, tmp_path / "theirs")
    assert [(place.branch.method.rank, place.branch.method.alpha) for place in patch.places] == [(1, 3), (2, 4), (8, 4)]
    torch.testing.assert_close(model(x), expected, rtol=1e-8, atol=1e-8)
    patch.save_pretrained(tmp_path / "ours")
    patch.eject()
    again = peft.PeftModel.from_pretrained(model, tmp_path / "ours").double()
    torch.testing.assert_close(again(x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.LoKrConfig])
@torch.no_grad()
def test_peft_pads_the_update_of_a_circular_convolution_with_zeros(kind: type[peft.PeftConfig], tmp_path: Path) -> None:
    """PEFT runs the update as a convolution of its own that knows no padding mode: merged it computes something else.

    Ours is what the layer computes of the changed weight, which is what PEFT merges to.
    """
    base, x = Net(LAYERS["circular conv"][0]()).double(), LAYERS["circular conv"][1]().double()
    theirs = filled(base, kind(r=2, alpha=4, target_modules=["layer"]), tmp_path)
    beside = theirs(x)
    merged = theirs.merge_and_unload()(x)
    assert (beside - merged).abs().max() > 0.1
    adapters.load(base, tmp_path)
    torch.testing.assert_close(base(x), merged, rtol=1e-8, atol=1e-8)


@torch.no_grad()
def test_peft_swaps_the_factors_of_a_conv1d(tmp_path: Path) -> None:
    """A whole second factor of a Conv1d comes out as w2 ⊗ w1 in PEFT, as `torch.kron` aligns shapes at their ends.

    Of a Conv2d, and of decomposed factors, it is w1 ⊗ w2. Neither is such a file loaded as if it said that, nor is one
    written that PEFT would take for something else.
    """
    base = Net(nn.Conv1d(4, 6, 3, bias=False)).double()
    theirs = filled(base, peft.LoKrConfig(r=8, target_modules=["layer"]), tmp_path / "theirs")
    layer = theirs.base_model.model.layer
    w1, w2 = layer.lokr_w1["default"], layer.lokr_w2["default"]
    swapped = torch.einsum("bdk,ac->badck", w2, w1).reshape(6, 4, 3)
    torch.testing.assert_close(layer.get_delta_weight("default"), swapped)
    assert not torch.allclose(swapped, torch.einsum("ac,bdk->abcdk", w1, w2).reshape(6, 4, 3))
    with pytest.raises(weights.FileFormatError, match="multiplies the factors in the wrong order"):
        adapters.load(base, tmp_path / "theirs")
    patch = adapters.inject(base, adapters.LoKr(rank=8))
    with pytest.raises(weights.FileFormatError, match="multiplies the factors in the wrong order"):
        patch.save_pretrained(tmp_path / "ours")


@pytest.mark.parametrize("size", range(1, 73))
def test_factors_are_split_as_peft_splits_them(size: int) -> None:
    for factor in (-1, *range(1, size + 2)):
        assert divisor(size, factor) == factorization(size, factor)[0]
