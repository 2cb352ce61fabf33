"""Files of the real PEFT, of every method on every layer that it supports, load here by themselves; and ours there."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapters
import weights


class Net(nn.Module):
    """One layer that is adapted, and one that is not."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.other = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Holder(nn.Module):
    """Puts a layer under the name that the configurations target."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Several(nn.Module):
    """Layers of different sizes, all adapted."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*map(Holder, layers))

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(x)


def around(layer: nn.Module) -> nn.Module:
    """A model with what `LAYERS` makes."""
    return layer if isinstance(layer, Several) else Net(layer)


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
    "embedding": (lambda: nn.Embedding(11, 8), lambda: torch.randint(0, 11, (4, 3))),
    "several linears": (
        lambda: Several(nn.Linear(6, 8), nn.Linear(8, 12, bias=False), nn.Linear(12, 4)),
        lambda: torch.randn(4, 3, 6),
    ),
    "several conv1ds": (lambda: Several(Conv1D(8, 6), nn.Linear(8, 4)), lambda: torch.randn(4, 3, 6)),
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


SEVERAL = ("several linears", "several conv1ds")
LORA_LAYERS = (*LINEARS, "transformers conv1d", *CONVOLUTIONS, "embedding")
LINEAR_MAPS = (*LINEARS, "transformers conv1d", *SEVERAL)
CASES: dict[str, Case] = {
    "lora": Case(configured(peft.LoraConfig, r=3, lora_alpha=5), LORA_LAYERS),
    "rslora": Case(configured(peft.LoraConfig, r=3, lora_alpha=5, use_rslora=True), LORA_LAYERS),
    "lora with bias": Case(configured(peft.LoraConfig, r=3, lora_alpha=5, lora_bias=True), (*LINEARS[::2], "conv")),
    "lora and biases": Case(configured(peft.LoraConfig, r=3, bias="lora_only"), (*LINEARS, *CONVOLUTIONS)),
    "lora and all biases": Case(configured(peft.LoraConfig, r=3, bias="all"), ("linear", "linear without bias")),
    "lora and another layer": Case(configured(peft.LoraConfig, r=3, modules_to_save=["other"]), ("linear",)),
    "vera": Case(configured(peft.VeraConfig, r=3), LINEAR_MAPS),
    "vera from a key": Case(configured(peft.VeraConfig, r=5, projection_prng_key=7, d_initial=0.5), LINEAR_MAPS),
    "vera and biases": Case(configured(peft.VeraConfig, r=5, bias="vera_only"), ("linear", "several linears")),
    "randlora": Case(configured(peft.RandLoraConfig, r=3, randlora_alpha=30), LINEAR_MAPS),
    "randlora of rank 1": Case(configured(peft.RandLoraConfig, r=1, randlora_alpha=4), LINEAR_MAPS),
    "randlora of high rank": Case(configured(peft.RandLoraConfig, r=16, randlora_alpha=40), LINEAR_MAPS),
    "sparse randlora": Case(
        configured(peft.RandLoraConfig, r=3, randlora_alpha=30, sparse=True, projection_prng_key=3), LINEAR_MAPS
    ),
    "very sparse randlora": Case(
        configured(peft.RandLoraConfig, r=2, randlora_alpha=30, very_sparse=True, projection_prng_key=5), LINEAR_MAPS
    ),
    "vblora": Case(configured(peft.VBLoRAConfig, r=3, num_vectors=7, vector_length=2), LINEAR_MAPS),
    "vblora of one vector": Case(
        configured(peft.VBLoRAConfig, r=2, num_vectors=300, vector_length=1, topk=1), LINEAR_MAPS
    ),
    "vblora of many vectors": Case(
        configured(peft.VBLoRAConfig, r=3, num_vectors=9, vector_length=2, topk=5), LINEAR_MAPS
    ),
    "fourierft": Case(configured(peft.FourierFTConfig, n_frequency=9, random_loc_seed=5), LINEAR_MAPS, 1e-5),
    "fourierft from another seed": Case(
        configured(peft.FourierFTConfig, n_frequency=2, scaling=20.0, random_loc_seed=5, init_weights=True),
        LINEAR_MAPS,
        1e-5,
    ),
    "gralora": Case(configured(peft.GraloraConfig, r=4, alpha=5), LINEAR_MAPS),
    "gralora of one block": Case(configured(peft.GraloraConfig, r=3, alpha=5, gralora_k=1), LINEAR_MAPS),
    "hybrid gralora": Case(configured(peft.GraloraConfig, r=2, alpha=5, hybrid_r=3), LINEAR_MAPS),
    "shira": Case(configured(peft.ShiraConfig, r=1), (*LINEARS, "several linears")),
    "shira from a seed": Case(configured(peft.ShiraConfig, r=2, random_seed=3), (*LINEARS, "several linears")),
}


# PEFT writes what all layers share once more for each layer.
REPEATED = re.compile(r"base_model\.model\..*\.randlora_[AB]")
# What only says how the layers were chosen and how the tensors were made.
NOT_KEPT = {"auto_mapping", "bias", "fan_in_fan_out", "init_lora_weights", "init_weights", "target_modules"}


def parity() -> list[tuple[str, str]]:
    return [(name, layer) for name, case in CASES.items() for layer in case.layers]


@pytest.mark.parametrize(("name", "layer"), parity(), ids=lambda value: value)
def test_files_mean_the_same_there_and_here(name: str, layer: str, tmp_path: Path) -> None:
    case, (make, sample) = CASES[name], LAYERS[layer]
    torch.manual_seed(0)
    base, x = around(make()).double().eval(), sample()
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
        theirs = peft.get_peft_model(around(make()), case.config())
        theirs.save_pretrained(tmp_path / "theirs")
        model = around(make())
        adapters.load(model, tmp_path / "theirs").save_pretrained(tmp_path / "ours")
        one, other = (weights.open(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
        one = {key: tensor for key, tensor in one.items() if not REPEATED.fullmatch(key)}
        assert {key: tensor.shape for key, tensor in one.items()} == {key: t.shape for key, t in other.items()}
        configs = [peft.PeftConfig.from_pretrained(tmp_path / who).to_dict() for who in ("theirs", "ours")]
    one, other = ({name: value for name, value in config.items() if name not in NOT_KEPT} for config in configs)
    assert one == other
