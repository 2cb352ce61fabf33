"""Methods with random and shared tensors beside the real PEFT: what files leave out, and what PEFT gets wrong."""

from __future__ import annotations

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
from adapters import FourierFT, Method, RandLoRA, SHiRA, TargetError, VeRA
from tests.peers.test_peft_methods import LAYERS, Holder, around


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"), torch.no_grad():
        yield


def perturbed(model: nn.Module, std: float = 0.3) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn_like(parameter) * std)
    return model


def wrap(base: nn.Module, kind: type[peft.PeftConfig], **settings: Any) -> nn.Module:
    """PEFT's model, in the dtype of the base, with values."""
    dtype = next(base.parameters()).dtype
    config = kind(target_modules=["layer"], **settings)
    return perturbed(peft.get_peft_model(copy.deepcopy(base), config).to(dtype)).eval()


# Random tensors that are not in the file

RANDOM: dict[str, tuple[type[peft.PeftConfig], dict[str, Any], Method]] = {
    "vera": (peft.VeraConfig, {"r": 3, "projection_prng_key": 7}, VeRA(rank=3, seed=7)),
    "randlora": (peft.RandLoraConfig, {"r": 3, "projection_prng_key": 7}, RandLoRA(rank=3, seed=7)),
    "sparse randlora": (
        peft.RandLoraConfig,
        {"r": 3, "projection_prng_key": 7, "sparse": True},
        RandLoRA(rank=3, seed=7, sparse=True),
    ),
    "very sparse randlora": (
        peft.RandLoraConfig,
        {"r": 2, "projection_prng_key": 9, "very_sparse": True},
        RandLoRA(rank=2, seed=9, very_sparse=True),
    ),
}


@pytest.mark.parametrize("layer", ["linear", "transformers conv1d", "several linears", "several conv1ds"])
@pytest.mark.parametrize("name", RANDOM)
def test_what_is_not_in_the_file_comes_from_the_seed(name: str, layer: str, tmp_path: Path) -> None:
    kind, settings, method = RANDOM[name]
    make, sample = LAYERS[layer]
    base, x = around(make()).double(), sample().double()
    theirs = wrap(base, kind, save_projection=False, **settings)
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "theirs")
    assert not [
        key for key in load_file(tmp_path / "theirs" / "adapter_model.safetensors") if key.endswith(("_A", "_B"))
    ]
    ours = copy.deepcopy(base)
    patch = adapters.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), expected, rtol=1e-8, atol=1e-8)
    # What is saved here has them.
    patch.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").double()
    torch.testing.assert_close(again(x), expected, rtol=1e-8, atol=1e-8)
    # And what is made here has the same, to the bit.
    patch.eject()
    fresh = adapters.inject(ours, method, "layer")
    for tensor, (attribute, shared) in zip(
        (getattr(theirs.base_model, f"{method.key}_{letter}")["default"] for letter in "AB"),
        fresh.attachments[0].branch.shared_tensors().items(),
        strict=True,
    ):
        assert torch.equal(tensor, shared), attribute


def test_positions_come_from_the_same_seeds() -> None:
    base = LAYERS["several linears"][0]()
    theirs = wrap(base, peft.FourierFTConfig, n_frequency=9, random_loc_seed=5)
    ours = adapters.inject(copy.deepcopy(base), FourierFT(n_frequency=9, seed=5), "layer")
    for holder, place in zip(theirs.base_model.model.blocks, ours.attachments, strict=True):
        rows, columns = holder.layer.indices["default"]
        assert torch.equal(rows * place.branch.matrix.shape[1] + columns, place.branch.positions)
    theirs = wrap(base, peft.ShiraConfig, r=2, random_seed=5)
    ours = adapters.inject(copy.deepcopy(base), SHiRA(rank=2, seed=5), "layer")
    for holder, place in zip(theirs.base_model.model.blocks, ours.attachments, strict=True):
        assert torch.equal(holder.layer.shira_indices["default"], place.branch.shira_indices)


# What PEFT gets wrong


def test_randlora_bases_are_in_the_file_once(tmp_path: Path) -> None:
    """PEFT writes the bases, which all layers share, once for each layer and once more: 4 times for 3 layers."""
    base = LAYERS["several linears"][0]()
    wrap(base, peft.RandLoraConfig, r=3).save_pretrained(tmp_path / "theirs")
    adapters.load(base, tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    for who, times in (("theirs", 4), ("ours", 1)):
        names = load_file(tmp_path / who / "adapter_model.safetensors")
        assert sum(name.endswith("randlora_B") for name in names) == times


def test_sparse_bases_of_zeros_do_not_make_everything_nan() -> None:
    """PEFT divides by the standard deviation of zeros, and the output is nan from the start."""
    base, x = nn.ModuleDict({"layer": nn.Linear(2, 2)}), torch.randn(3, 2)
    model = wrap(base, peft.RandLoraConfig, r=1, sparse=True)
    assert model.base_model.model["layer"](x).isnan().all()
    with pytest.raises(TargetError, match="all equal at rank=1 and seed=0: choose another seed, or a larger rank"):
        adapters.inject(base, RandLoRA(rank=1, sparse=True))


@pytest.mark.parametrize("layer", ["linear", "transformers conv1d", "several linears", "several conv1ds"])
@pytest.mark.parametrize(("vectors", "topk"), [(7, 3), (7, 1), (300, 2)])
def test_vblora_files_for_inference(layer: str, vectors: int, topk: int, tmp_path: Path) -> None:
    make, sample = LAYERS[layer]
    base, x = around(make()), sample()
    settings = {"r": 3, "num_vectors": vectors, "vector_length": 2, "topk": topk, "save_only_topk_weights": True}
    theirs = wrap(base, peft.VBLoRAConfig, **settings)
    expected = theirs(x)
    assert not torch.allclose(expected, base(x), rtol=1e-2, atol=1e-2)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    patch = adapters.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in patch.parameters())
    patch.save_pretrained(tmp_path / "ours")
    one, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    assert {key: (t.shape, t.dtype) for key, t in one.items()} == {key: (t.shape, t.dtype) for key, t in other.items()}
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours")
    torch.testing.assert_close(again(x), expected, rtol=1e-5, atol=1e-5)
    patch.merge()
    torch.testing.assert_close(ours(x), expected, rtol=1e-5, atol=1e-5)
    patch.eject()
    assert torch.equal(ours(x), base(x))
    # PEFT notices in the first pass of the training; here it is known when the adapter is loaded.
    again.train()
    with pytest.raises(RuntimeError, match="was not resumed from a `save_only_topk_weights` model"):
        again(x)
    with pytest.raises(adapters.LayerMismatchError, match="cannot be trained: it was saved for inference"):
        adapters.load(ours, tmp_path / "theirs", trainable=True)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.bfloat16, 0.05), (torch.float16, 0.01)])
def test_vblora_files_for_inference_in_any_dtype(dtype: torch.dtype, tolerance: float, tmp_path: Path) -> None:
    """PEFT cannot read its own file unless it was written in single precision: it scatters into a float32 tensor."""
    make, sample = LAYERS["several linears"]
    base, x = make().to(dtype), sample().to(dtype)
    settings = {"r": 3, "num_vectors": 7, "vector_length": 2, "topk": 3, "save_only_topk_weights": True}
    theirs = wrap(base, peft.VBLoRAConfig, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(RuntimeError, match=r"scatter\(\): Expected self.dtype to be equal to src.dtype"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    ours = copy.deepcopy(base)
    adapters.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), theirs(x), rtol=tolerance, atol=tolerance)


def test_the_order_of_patterns_does_not_decide_whether_a_file_loads(tmp_path: Path) -> None:
    """PEFT takes the first pattern that matches, but sorts them when it saves, so it may not read its own file."""
    base = LAYERS["several linears"][0]()
    patterns = {"layer": 4, r"1\.layer": 11}
    theirs = wrap(base, peft.FourierFTConfig, n_frequency=9, n_frequency_pattern=patterns)
    theirs.save_pretrained(tmp_path / "theirs")
    with pytest.raises(RuntimeError, match=r"size mismatch for .*fourierft_spectrum"):
        peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs")
    x, ours = torch.randn(4, 6), copy.deepcopy(base)
    adapters.load(ours, tmp_path / "theirs")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


class Nested(nn.Module):
    """Layers of which one has the path of the tail of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)
        self.a = Holder(nn.Linear(6, 6))
        self.b = nn.Sequential(OrderedDict(c=Holder(nn.Linear(6, 6))))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.layer(x)))


@pytest.mark.parametrize("counts", [(5, 3, 3), (3, 5, 3), (3, 3, 5), (3, 4, 5), (5, 5, 3), (5, 3, 5)])
def test_frequencies_of_each_layer_load_in_peft(counts: tuple[int, ...], tmp_path: Path) -> None:
    base, x = Nested(), torch.randn(4, 6)
    paths = ("layer", "a.layer", "b.c.layer")
    ours = copy.deepcopy(base)
    methods = {path: FourierFT(n_frequency=count) for path, count in zip(paths, counts, strict=True)}
    patch = adapters.inject(ours, {exactly(path): method for path, method in methods.items()})
    assert {place.path: place.branch.method for place in patch.attachments} == methods
    perturbed(ours, 0.003)  # The formula multiplies by 150, and what is large is rounded by more than the tolerance.
    patch.save_pretrained(tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    torch.testing.assert_close(theirs(x), ours(x), rtol=1e-5, atol=1e-5)
    patch.eject()
    again = adapters.load(ours, tmp_path / "ours")
    assert {place.path: place.branch.method for place in again.attachments} == methods


def exactly(path: str) -> Callable[[str, nn.Module], bool]:
    return lambda found, module: found == path


def test_shira_keeps_the_forward_of_its_layer() -> None:
    """PEFT's SHiRA computes a linear layer itself, whatever the layer computes: twice the output here."""

    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    base, x = nn.Sequential(Doubling(6, 8)), torch.randn(3, 6)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.ShiraConfig(r=1, target_modules=["0"]))
    torch.testing.assert_close(2 * theirs(x), base(x))
    ours = copy.deepcopy(base)
    patch = adapters.inject(ours, SHiRA(rank=1))
    assert torch.equal(ours(x), base(x))
    perturbed(ours)
    branch = patch.attachments[0].branch
    weight = base[0].weight.clone()
    weight[tuple(branch.shira_indices.long())] += branch.shira_weight
    torch.testing.assert_close(ours(x), 2 * nn.functional.linear(x, weight, base[0].bias))


def test_fourierft_starts_at_the_identity() -> None:
    """PEFT's default starts at random values, 27 off the output of a layer of 6 to 8 features."""
    base, x = nn.Sequential(nn.Linear(6, 8)), torch.randn(5, 6)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.FourierFTConfig(n_frequency=9, target_modules=["0"]))
    assert (theirs(x) - base(x)).abs().max() > 1
    ours = copy.deepcopy(base)
    adapters.inject(ours, FourierFT(n_frequency=9))
    assert torch.equal(ours(x), base(x))
