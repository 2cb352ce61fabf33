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
from peft.tuners.lokr.layer import factorization
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapters
import weights
from adapters.methods.lokr import divisor
from tests.thinned import one_in


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
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), lambda: torch.randn(2, 4, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 4, (1, 2, 3), padding=1), lambda: torch.randn(2, 2, 3, 4, 5)),
    "strided conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), lambda: torch.randn(2, 4, 7)),
    "conv1d of kernel 1": (lambda: nn.Conv1d(4, 6, 1), lambda: torch.randn(2, 4, 7)),
    "embedding": (lambda: nn.Embedding(11, 8), lambda: torch.randint(0, 11, (4, 3))),
    "several linears": (
        lambda: Several(nn.Linear(6, 8), nn.Linear(8, 12, bias=False), nn.Linear(12, 4)),
        lambda: torch.randn(4, 3, 6),
    ),
    "several conv1ds": (lambda: Several(Conv1D(8, 6), nn.Linear(8, 4)), lambda: torch.randn(4, 3, 6)),
    "layer norm": (lambda: nn.LayerNorm(6), lambda: torch.randn(4, 3, 6)),
    "layer norm without bias": (lambda: nn.LayerNorm(6, bias=False), lambda: torch.randn(4, 3, 6)),
    "group norm": (lambda: nn.GroupNorm(2, 6), lambda: torch.randn(4, 6, 3)),
    "batch norm": (lambda: nn.BatchNorm1d(6), lambda: torch.randn(4, 6)),
    "rms norm": (lambda: nn.RMSNorm(6), lambda: torch.randn(4, 3, 6)),
}
LINEARS = ("linear", "linear without bias", "square linear")
# What PEFT's adapters on a convolution compute is what they say, whatever the convolution.
CONVOLUTIONS = ("conv", "conv of stride 2", "oblong conv", "conv of kernel 1")
NORMS = ("layer norm", "layer norm without bias", "group norm", "batch norm", "rms norm")


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
    return lambda: kind(**{"target_modules": ["layer"], **settings})


def oft(**settings: Any) -> Callable[..., peft.PeftConfig]:
    return configured(peft.OFTConfig, **{"oft_block_size": 0, **settings})


# Its OFT of other convolutions is not the identity at the start, and its BOFT and HRA take a kernel for square.
OFT_LAYERS = (*LINEARS, "conv of kernel 1", "embedding")
SQUARE_CONVOLUTIONS = ("conv", "conv of stride 2", "conv of kernel 1")
SEVERAL = ("several linears", "several conv1ds")
# LoHa and LoKr take all of the geometry into account besides how the input is padded.
LYCORIS_LAYERS = (
    *LINEARS,
    *CONVOLUTIONS,
    "conv of dilation 2",
    "conv of groups 2",
    "strided conv1d",
    "conv1d of kernel 1",
)


def alone(**settings: Any) -> Callable[..., peft.PeftConfig]:
    """What PEFT saves besides adapters, in a file without any."""
    return lambda **more: peft.LoraConfig(target_modules="dummy-target-modules", **settings, **more)


LORA_LAYERS = (*LINEARS, "transformers conv1d", *CONVOLUTIONS, "embedding")
LINEAR_MAPS = (*LINEARS, "transformers conv1d", *SEVERAL)
CASES: dict[str, Case] = {
    "lora": Case(configured(peft.LoraConfig, r=3, lora_alpha=5), LORA_LAYERS),
    "rslora": Case(configured(peft.LoraConfig, r=3, lora_alpha=5, use_rslora=True), LORA_LAYERS),
    "lora with bias": Case(configured(peft.LoraConfig, r=3, lora_alpha=5, lora_bias=True), (*LINEARS[::2], "conv")),
    "lora and biases": Case(configured(peft.LoraConfig, r=3, bias="lora_only"), (*LINEARS, *CONVOLUTIONS)),
    "lora and all biases": Case(configured(peft.LoraConfig, r=3, bias="all"), ("linear", "linear without bias")),
    "dora": Case(configured(peft.LoraConfig, r=3, lora_alpha=5, use_dora=True), LORA_LAYERS),
    "rsdora": Case(configured(peft.LoraConfig, r=3, lora_alpha=5, use_rslora=True, use_dora=True), LORA_LAYERS),
    "adalora": Case(
        configured(peft.AdaLoraConfig, init_r=4, lora_alpha=5, total_step=1),
        (*LINEARS, "transformers conv1d", *CONVOLUTIONS, "conv of dilation 2"),
    ),
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
    "oft": Case(oft(oft_block_size=2), OFT_LAYERS),
    "oft of blocks": Case(oft(r=2, num_cayley_neumann_terms=7), OFT_LAYERS),
    "oft of few terms": Case(oft(oft_block_size=2, num_cayley_neumann_terms=2), ("linear", "embedding")),
    "oft of four terms": Case(oft(oft_block_size=2, num_cayley_neumann_terms=4), ("linear", "embedding")),
    "oft, exact": Case(oft(r=2, use_cayley_neumann=False), OFT_LAYERS),
    "oft, shared": Case(oft(oft_block_size=2, block_share=True), OFT_LAYERS),
    "oft, shared, of blocks": Case(oft(r=2, block_share=True), OFT_LAYERS),
    "coft": Case(oft(oft_block_size=2, coft=True, eps=0.9), OFT_LAYERS, 1e-5),
    "coft, shared": Case(oft(r=2, coft=True, eps=0.4, block_share=True), OFT_LAYERS, 1e-5),
    "oft and biases": Case(oft(r=2, bias="oft_only"), ("linear", "linear without bias")),
    "boft": Case(configured(peft.BOFTConfig, boft_block_size=2), (*LINEARS, *SQUARE_CONVOLUTIONS)),
    "boft of odd blocks": Case(configured(peft.BOFTConfig, boft_block_size=3), ("linear", "conv")),
    "boft of blocks": Case(
        configured(peft.BOFTConfig, boft_block_num=2, boft_block_size=0), (*LINEARS, *SQUARE_CONVOLUTIONS)
    ),
    "boft and biases": Case(configured(peft.BOFTConfig, boft_block_size=2, bias="boft_only"), ("linear", "conv")),
    "hra": Case(configured(peft.HRAConfig, r=4), (*LINEARS, *SQUARE_CONVOLUTIONS)),
    "hra of odd rank": Case(configured(peft.HRAConfig, r=3), (*LINEARS, *SQUARE_CONVOLUTIONS)),
    "hra, orthogonal": Case(configured(peft.HRAConfig, r=3, apply_GS=True), (*LINEARS, *SQUARE_CONVOLUTIONS)),
    "hra and biases": Case(configured(peft.HRAConfig, bias="hra_only"), ("linear", "conv")),
    "c3a": Case(configured(peft.C3AConfig, block_size=2), LINEARS, 1e-5),
    "miss": Case(configured(peft.MissConfig, r=2), LINEARS),
    "miss of a rank that does not divide": Case(configured(peft.MissConfig, r=5), LINEARS),
    "mini miss": Case(configured(peft.MissConfig, r=4, mini_r=2, init_weights="mini"), LINEARS),
    "bat": Case(configured(peft.MissConfig, r=2, init_weights="bat"), LINEARS),
    "miss and biases": Case(configured(peft.MissConfig, r=2, bias="all"), ("linear",)),
}

IA3_LAYERS = (
    *LINEARS,
    "transformers conv1d",
    *(name for name in LAYERS if name.endswith(("conv", "conv of")) or name.startswith(("conv of", "conv3d"))),
)
HIRA_LAYERS = (*LORA_LAYERS, "conv of stride 2", "conv of dilation 2", "conv1d", "conv3d")
CASES |= {
    "ia3": Case(configured(peft.IA3Config, feedforward_modules=[]), IA3_LAYERS),
    "ia3 of the input": Case(configured(peft.IA3Config, feedforward_modules=["layer"]), IA3_LAYERS),
    "ia3 by a pattern": Case(configured(peft.IA3Config, feedforward_modules="lay.*"), ("linear",)),
    "road_1": Case(configured(peft.RoadConfig, group_size=4), LINEARS),
    "road_2": Case(configured(peft.RoadConfig, group_size=8, variant="road_2"), LINEARS),
    "road_4": Case(configured(peft.RoadConfig, group_size=4, variant="road_4"), LINEARS),
    "glora": Case(configured(peft.GloraConfig, r=3), LINEARS),
    "glora of vectors": Case(
        configured(peft.GloraConfig, config_A_B="vector", config_C="vector", config_D_E="vector"), LINEARS
    ),
    "glora of constants": Case(
        configured(peft.GloraConfig, config_A_B="constant", config_C="none", config_D_E="constant"), LINEARS
    ),
    "glora of biases": Case(configured(peft.GloraConfig, r=2, config_A_B="none"), ("linear", "square linear")),
    "glora of weights": Case(configured(peft.GloraConfig, r=2, config_C="none", config_D_E="none"), LINEARS),
    "hira": Case(configured(peft.HiraConfig, r=3), HIRA_LAYERS),
    "delora": Case(configured(peft.DeloraConfig, r=3, delora_lambda=4), LINEARS),
    "delora by patterns": Case(
        configured(
            peft.DeloraConfig,
            target_modules=["layer", "other"],
            r=2,
            rank_pattern={"^layer": 3},
            delora_lambda=4,
            lambda_pattern={"^layer": 7},
        ),
        LINEARS,
    ),
}
CASES |= {
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
    "biases alone": Case(alone(bias="all"), ("linear", "conv", "layer norm")),
    "a layer alone": Case(
        alone(modules_to_save=["layer"]),
        (*LINEARS, "transformers conv1d", "conv", "embedding", "layer norm", "batch norm"),
    ),
    "trainable tokens": Case(configured(peft.TrainableTokensConfig, token_indices=[7, 0, 3, 4]), ("embedding",)),
    "norm tuning": Case(configured(peft.LNTuningConfig), NORMS),
    "norm tuning and another layer": Case(configured(peft.LNTuningConfig, modules_to_save=["other"]), ("layer norm",)),
}


# PEFT writes what all layers share once more for each layer.
REPEATED = re.compile(r"base_model\.model\..*\.randlora_[AB]")
# What only says how the layers were chosen, and how and by what the tensors were made.
# What only says how the layers were chosen and how the tensors were made.
NOT_KEPT = {
    "auto_mapping",
    "bias",
    "fan_in_fan_out",
    "init_lora_weights",
    "init_weights",
    "peft_version",
    "feedforward_modules",
    "module_dropout",
    "rank_dropout",
    "rank_dropout_scale",
    "target_modules",
}


PARITY = [(name, layer) for name, case in CASES.items() for layer in case.layers]


def thinned(pairs: list[tuple[str, str]]) -> list[Any]:
    """Each configuration on one layer, and a third of all."""
    return one_in(3, pairs, key=lambda pair: pair[0])


@pytest.mark.parametrize(("name", "layer"), thinned(PARITY), ids=lambda value: value)
def test_files_mean_the_same_there_and_here(name: str, layer: str, tmp_path: Path) -> None:
    case, (make, sample) = CASES[name], LAYERS[layer]
    torch.default_generator.manual_seed(0)
    base, x = around(make()).double().eval(), sample()
    x = x.double() if x.is_floating_point() else x
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        theirs = peft.get_peft_model(copy.deepcopy(base), case.config()).double().eval()
        for key, parameter in theirs.named_parameters():
            if parameter.requires_grad and "ranknum" not in key:  # AdaLoRA's, which PEFT trains and does not save.
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


@pytest.mark.parametrize(("name", "layer"), thinned(PARITY[::3]), ids=lambda value: value)
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
    assert [(place.branch.method.rank, place.branch.method.alpha) for place in patch.attachments] == [
        (1, 3),
        (2, 4),
        (8, 4),
    ]
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
        patch.save_pretrained(tmp_path / "ours", format="peft")


@pytest.mark.parametrize("size", range(1, 73))
def test_factors_are_split_as_peft_splits_them(size: int) -> None:
    for factor in (-1, *range(1, size + 2)):
        assert divisor(size, factor) == factorization(size, factor)[0]
