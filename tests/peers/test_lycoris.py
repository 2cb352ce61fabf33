"""Files of the real LyCORIS load here by themselves, and ours there, of every method that both have."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lycoris import LycorisNetwork, create_lycoris_from_weights
from torch import Tensor, nn
from torch.nn import functional as F

import adapters
import weights
from adapters import DoHa, DoKr, LoHa, LoKr, LoRA
from tests.adapters.models import perturb


class Net(nn.Module):
    """One layer, whose path has a `_` beside its dots."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.in_block = nn.ModuleList([layer])

    def forward(self, x: Tensor) -> Tensor:
        return self.in_block[0](x)


def conv(kernel: Any = 3, **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Conv2d(8, 12, kernel, **options)


def image() -> Tensor:
    return torch.randn(2, 8, 7, 7)


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(12, 8), lambda: torch.randn(4, 3, 12)),
    "linear without bias": (lambda: nn.Linear(16, 16, bias=False), lambda: torch.randn(4, 16)),
    "conv": (conv(padding=1), image),
    "conv of stride 2": (conv(stride=2), image),
    "conv of dilation 2": (conv(dilation=2), image),
    "conv of groups 2": (conv(groups=2), image),
    "oblong conv": (conv((3, 2)), image),
    "conv of kernel 1": (conv(1), image),
    "conv1d": (lambda: nn.Conv1d(8, 12, 3, stride=2), lambda: torch.randn(2, 8, 7)),
    "layer norm": (lambda: nn.LayerNorm(12), lambda: torch.randn(4, 12)),
    "conv3d": (lambda: nn.Conv3d(8, 12, 2), lambda: torch.randn(2, 8, 4, 4, 4)),
}

ALGORITHMS: dict[str, dict[str, Any]] = {
    "locon": {"network_module": "lora", "lora_dim": 2, "alpha": 3},
    # The rank is a square, so that the alpha in the file is exact: it is there in single precision.
    "rslora": {"network_module": "lora", "lora_dim": 4, "alpha": 2, "rs_lora": True},
    "locon with a core": {"network_module": "lora", "lora_dim": 2, "alpha": 3, "use_tucker": True},
    "loha": {"network_module": "loha", "lora_dim": 2, "alpha": 3},
    "loha with cores": {"network_module": "loha", "lora_dim": 2, "alpha": 3, "use_tucker": True},
    "lokr": {"network_module": "lokr", "lora_dim": 1, "alpha": 3},
    "lokr of large rank": {"network_module": "lokr", "lora_dim": 100, "alpha": 3},
    "lokr of full matrices": {"network_module": "lokr", "lora_dim": 2, "alpha": 3, "full_matrix": True},
    "lokr of factor 2": {"network_module": "lokr", "lora_dim": 1, "alpha": 3, "factor": 2},
    "lokr of factor 6": {"network_module": "lokr", "lora_dim": 1, "alpha": 3, "factor": 6},
    "lokr of two decomposed factors": {"network_module": "lokr", "lora_dim": 1, "alpha": 3, "decompose_both": True},
    "lokr with a core": {"network_module": "lokr", "lora_dim": 1, "alpha": 3, "use_tucker": True},
    "lokr, unbalanced": {"network_module": "lokr", "lora_dim": 1, "alpha": 3, "unbalanced_factorization": True},
}
# By the key of the method.
MORE_ALGORITHMS: dict[str, dict[str, dict[str, Any]]] = {
    "doha": {
        "doha": {"network_module": "loha", "lora_dim": 2, "alpha": 3, "weight_decompose": True},
        "doha with cores": {
            "network_module": "loha",
            "lora_dim": 2,
            "alpha": 3,
            "weight_decompose": True,
            "use_tucker": True,
        },
    },
    "dokr": {
        "dokr": {"network_module": "lokr", "lora_dim": 1, "alpha": 3, "weight_decompose": True},
        "dokr of inputs": {
            "network_module": "lokr",
            "lora_dim": 1,
            "alpha": 3,
            "weight_decompose": True,
            "wd_on_out": False,
        },
        "dokr of large rank": {"network_module": "lokr", "lora_dim": 100, "alpha": 3, "weight_decompose": True},
    },
    "dora": {
        "dora": {"network_module": "lora", "lora_dim": 2, "alpha": 3, "weight_decompose": True},
        "dora of inputs": {
            "network_module": "lora",
            "lora_dim": 2,
            "alpha": 3,
            "weight_decompose": True,
            "wd_on_out": False,
        },
        "dora with a core": {
            "network_module": "lora",
            "lora_dim": 2,
            "alpha": 3,
            "weight_decompose": True,
            "use_tucker": True,
        },
    },
    "lycoris-glora": {"glora": {"network_module": "glora", "lora_dim": 2, "alpha": 3}},
    "full": {"full": {"network_module": "full", "lora_dim": 2, "alpha": 3, "train_norm": True}},
    "diag-oft": {
        "oft": {"network_module": "diag-oft", "lora_dim": 4, "alpha": 3},
        "rescaled oft": {
            "network_module": "diag-oft",
            "lora_dim": 4,
            "alpha": 3,
            "constraint": 0.01,
            "rescaled": True,
        },
    },
    "output-boft": {
        "boft": {"network_module": "boft", "lora_dim": 4, "alpha": 3},
        "rescaled boft": {"network_module": "boft", "lora_dim": 4, "alpha": 3, "constraint": 0.01, "rescaled": True},
    },
    "ia3": {
        "ia3 of inputs": {"network_module": "ia3", "lora_dim": 2, "alpha": 3, "train_on_input": True},
        "ia3 of outputs": {"network_module": "ia3", "lora_dim": 2, "alpha": 3},
    },
}
for algorithms in MORE_ALGORITHMS.values():
    ALGORITHMS |= algorithms

# What LyCORIS saves and cannot make a network of again: it takes the wrong axis of a transposed factor for the rank, or
# guesses the shape of the first factor from those of all, and copies tensors into others of another shape; it forgets
# that lengths are those of inputs; and it hands IA3 one tensor too many.
NOT_LOADED_THERE = {"ia3 of inputs", "ia3 of outputs", "lokr with a core", "lokr, unbalanced"}
NOT_LOADED_THERE |= {"dora of inputs", "dokr of inputs"}


def pairs() -> Iterator[tuple[str, str]]:
    """The algorithms of LyCORIS and the layers on which they do not fail."""
    for algorithm in ALGORITHMS:
        for layer in LAYERS:
            ungrouped = (
                "glora" in algorithm or "ia3" in algorithm
            )  # Their tensors are of another shape than the weight.
            factored = "boft" not in algorithm or "linear" in layer  # Twice a power of 2.
            whole = layer != "layer norm" or algorithm == "full"
            if whole and factored and not (ungrouped and layer == "conv of groups 2"):
                yield algorithm, layer


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    logger = logging.getLogger("LyCORIS")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


def network(model: nn.Module, options: dict[str, Any]) -> LycorisNetwork:
    """An adapter of LyCORIS on every layer of a model, which it changes from now on."""
    dims = {"conv_lora_dim": options["lora_dim"], "conv_alpha": options["alpha"]}
    dtype = next(model.parameters()).dtype
    made = LycorisNetwork(model, 1.0, **dims, **options)
    made.apply_to()
    return made.to(dtype).eval()


def saved(model: nn.Module, options: dict[str, Any], path: Path) -> nn.Module:
    """A copy of a model with an adapter of LyCORIS of random numbers, which is in a file too."""
    adapted = copy.deepcopy(model)
    made = network(adapted, options)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    made.save_weights(str(path), None, {})
    return adapted


def loaded(model: nn.Module, path: Path) -> nn.Module:
    """A copy of a model with what LyCORIS makes of a file, in single precision."""
    adapted = copy.deepcopy(model)
    made, _ = create_lycoris_from_weights(1.0, str(path), adapted)
    assert len(made.loras) == 1
    made.apply_to()
    made.to(next(model.parameters()).dtype).eval()
    return adapted


@pytest.mark.parametrize(("algorithm", "layer"), list(pairs()), ids=lambda value: value)
@torch.no_grad()
def test_files_mean_the_same_there_and_here(algorithm: str, layer: str, tmp_path: Path) -> None:
    options, (make, sample) = ALGORITHMS[algorithm], LAYERS[layer]
    # What rotates is computed in single precision, whatever it is given.
    dtype, tolerance = (torch.float32, 1e-5) if "oft" in algorithm else (torch.float64, 1e-8)
    base, x = Net(make()).to(dtype).eval(), sample().to(dtype)
    expected = saved(base, options, tmp_path / "theirs.safetensors")(x)
    assert not torch.allclose(expected, base(x), rtol=1e-3, atol=1e-3)
    ours = copy.deepcopy(base)
    patch = adapters.load(ours, tmp_path / "theirs.safetensors")
    assert patch.name == "theirs" and next(iter(patch.targets)) == "in_block.0"
    torch.testing.assert_close(ours(x), expected, rtol=tolerance, atol=tolerance)
    patch.save_pretrained(tmp_path / "ours.safetensors", format="lycoris")
    again = copy.deepcopy(base)
    adapters.load(again, tmp_path / "ours.safetensors")
    torch.testing.assert_close(again(x), ours(x), rtol=1e-8, atol=1e-8)
    if "a core" not in algorithm or "lokr" in algorithm:  # Our LoRA has no core: it is multiplied out.
        there = copy.deepcopy(base)
        assert not network(there, options).load_weights(str(tmp_path / "ours.safetensors"))
        torch.testing.assert_close(there(x), expected, rtol=tolerance, atol=tolerance)
    if algorithm not in NOT_LOADED_THERE:
        torch.testing.assert_close(loaded(base, tmp_path / "ours.safetensors")(x), expected, rtol=1e-5, atol=1e-5)


MADE_HERE = {
    "lora": LoRA(rank=2, alpha=3),
    "rslora": LoRA(rank=3, alpha=2, rslora=True),
    "pissa": LoRA(rank=2, alpha=3, init="pissa"),
    "lora of alpha 0": LoRA(rank=2, alpha=0),
    "loha": LoHa(rank=2, alpha=3),
    "loha of alpha 0": LoHa(rank=2, alpha=0),
    "loha with cores": LoHa(rank=2, alpha=3, tucker=True),
    "doha": DoHa(rank=2, alpha=3),
    "lokr": LoKr(rank=1, alpha=3),
    "dokr of full factors": DoKr(rank=8, alpha=3),
    "lokr of full factors": LoKr(rank=8, alpha=3),
    "lokr of full factors, of alpha 0": LoKr(rank=8, alpha=0),
    "lokr of two decomposed factors": LoKr(rank=1, alpha=3, decompose_both=True),
}


@pytest.mark.parametrize("layer", ["linear", "conv", "conv of groups 2", "conv of kernel 1", "conv1d", "conv3d"])
@pytest.mark.parametrize("method", MADE_HERE)
@torch.no_grad()
def test_what_is_made_here_is_loaded_there(method: str, layer: str, tmp_path: Path) -> None:
    """Also where LyCORIS ignores alpha, or takes it for another: of two full factors, and where it is 0."""
    make, sample = LAYERS[layer]
    base, x = Net(make()).double().eval(), sample().double()
    ours = copy.deepcopy(base)
    patch = adapters.inject(ours, MADE_HERE[method])
    perturb(patch)
    patch.save_pretrained(tmp_path / "ours.safetensors", format="lycoris")
    torch.testing.assert_close(loaded(base, tmp_path / "ours.safetensors")(x), ours(x), rtol=1e-5, atol=1e-5)
    again = copy.deepcopy(base)
    adapters.load(again, tmp_path / "ours.safetensors")
    torch.testing.assert_close(again(x), ours(x), rtol=1e-8, atol=1e-8)


def update(path: Path, shape: torch.Size) -> Tensor:
    """What the one layer in a file adds to its weight, by the formulas of the papers."""
    t = {key.partition(".")[2]: tensor for key, tensor in weights.open(path).items()}
    if "lora_up.weight" in t:
        up, down = t["lora_up.weight"], t["lora_down.weight"]
        return t["alpha"].item() / len(down) * (up.flatten(1) @ down.flatten(1)).view(shape)
    if "hada_w1_a" in t:
        product = (t["hada_w1_a"] @ t["hada_w1_b"]) * (t["hada_w2_a"] @ t["hada_w2_b"])
        return t["alpha"].item() / len(t["hada_w1_b"]) * product.view(shape)
    second = t["lokr_w2_a"] @ t["lokr_w2_b"]
    return t["alpha"].item() / len(t["lokr_w2_b"]) * torch.kron(t["lokr_w1"], second).view(shape)


@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr"])
@torch.no_grad()
def test_lycoris_pads_the_update_of_a_circular_convolution_with_zeros(algorithm: str, tmp_path: Path) -> None:
    """LyCORIS runs the update as a convolution of its own that knows no padding mode. Ours is what the layer computes
    of the changed weight."""
    base, x = Net(conv(padding=1, padding_mode="circular")()).double(), image().double()
    path = tmp_path / "theirs.safetensors"
    theirs = saved(base, ALGORITHMS[algorithm], path)(x)
    layer = base.in_block[0]
    around = F.pad(x, (1, 1, 1, 1), mode="circular")
    expected = F.conv2d(around, layer.weight + update(path, layer.weight.shape), layer.bias)
    assert (theirs - expected).abs().max() > 0.5
    adapters.load(base, path)
    torch.testing.assert_close(base(x), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("algorithm", ["loha", "lokr"])
@torch.no_grad()
def test_lycoris_merges_the_scale_twice(algorithm: str, tmp_path: Path) -> None:
    """Merged, an update of LoHa or LoKr is `alpha / rank` times what it is unmerged in LyCORIS."""
    base, x = Net(nn.Linear(12, 8)).double(), torch.randn(4, 12).double()
    path = tmp_path / "theirs.safetensors"
    options = ALGORITHMS[algorithm]
    running = saved(base, options, path)(x)
    merged = copy.deepcopy(base)
    made, _ = create_lycoris_from_weights(1.0, str(path), merged)
    made.double().merge_to(1.0)
    change, scale = F.linear(x, update(path, torch.Size((8, 12)))), options["alpha"] / options["lora_dim"]
    torch.testing.assert_close(running, base(x) + change, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(merged(x), base(x) + scale * change, rtol=1e-4, atol=1e-4)
    patch = adapters.load(base, path)
    patch.merge()
    torch.testing.assert_close(base(x), running, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("algorithm", sorted(NOT_LOADED_THERE & ALGORITHMS.keys()))
@torch.no_grad()
def test_lycoris_cannot_load_what_it_saves(algorithm: str, tmp_path: Path) -> None:
    base, x = Net(conv()()).double(), image().double()
    path = tmp_path / "theirs.safetensors"
    expected = saved(base, ALGORITHMS[algorithm], path)(x)
    with pytest.raises(
        (AttributeError, RuntimeError, TypeError), match=r"no attribute|must match|broadcast|positional arg"
    ):
        create_lycoris_from_weights(1.0, str(path), copy.deepcopy(base))
    adapters.load(base, path)
    torch.testing.assert_close(base(x), expected, rtol=1e-8, atol=1e-8)
