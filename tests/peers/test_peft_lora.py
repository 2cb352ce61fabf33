"""The family of LoRA against the real PEFT: starts, DoRA, AdaLoRA and its allocator; and where PEFT goes wrong."""

from __future__ import annotations

import copy
import dataclasses
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapters
import weights
from adapters import AdaLoRA, DoRA, LoRA, RankAllocator
from tests.adapters.models import perturb


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 12)
        self.b = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(x)))


class One(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"):
        yield


def config(kind: Any = peft.LoraConfig, **settings: Any) -> peft.PeftConfig:
    return kind(**{"target_modules": ["a", "b"], **settings})


def wrapped(base: nn.Module, settings: peft.PeftConfig) -> Any:
    return peft.get_peft_model(copy.deepcopy(base), settings).eval()


@torch.no_grad()
def move(model: nn.Module, by: float = 0.3) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "ranknum" not in name:
            parameter.add_(torch.randn_like(parameter) * by)


def span(rows: Tensor) -> Tensor:
    q = torch.linalg.qr(rows.detach().mT).Q
    return q @ q.mT


def close(one: Tensor, other: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# Starts


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_files_that_start_at_a_part_of_the_weight(init: str, dora: bool, rslora: bool, tmp_path: Path) -> None:
    """PEFT takes the start out of the weight when it loads one; what is saved here is a plain one of twice the rank."""
    base, x = Net(), torch.randn(5, 6)
    theirs = wrapped(
        base, config(r=2, lora_alpha=5, init_lora_weights=init, use_dora=dora, use_rslora=rslora, rank_pattern={"a": 3})
    )
    move(theirs)
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = copy.deepcopy(base)
    patch = adapters.load(ours, tmp_path / "theirs", trainable=True)
    close(ours(x), expected)
    perturb(patch)
    expected = ours(x)
    patch.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()
    close(again(x), expected)
    assert again.peft_config["default"].init_lora_weights is True
    patch.eject()
    assert torch.equal(ours(x), base(x))


def test_an_embedding_has_no_start_in_a_file_that_names_one(tmp_path: Path) -> None:
    """PEFT starts embeddings as ever, whatever `init_lora_weights` says, and takes nothing out of them."""
    base, x = One(nn.Embedding(9, 6)), torch.randint(0, 9, (7,))
    theirs = wrapped(base, config(r=2, init_lora_weights="pissa", target_modules=["layer"]))
    move(theirs)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    adapters.load(ours, tmp_path)
    close(ours(x), theirs(x))


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("rslora", [False, True])
def test_files_that_were_converted_to_plain_ones(init: str, rslora: bool, tmp_path: Path) -> None:
    base, x = Net(), torch.randn(5, 6)
    theirs = wrapped(base, config(r=2, lora_alpha=6, init_lora_weights=init, use_rslora=rslora))
    theirs.peft_config["default"].init_lora_weights = True  # As PEFT's documentation has it, for the initial adapter.
    theirs.save_pretrained(tmp_path / "initial")
    theirs.peft_config["default"].init_lora_weights = init
    move(theirs)
    expected = theirs(x)
    theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=tmp_path / "initial")
    ours = copy.deepcopy(base)
    patch = adapters.load(ours, tmp_path / "plain")
    close(ours(x), expected)
    assert {place.branch.method.rank for place in patch.attachments} == {4}


def test_eva_finds_what_is_found_there() -> None:
    base, x = (
        Net(),
        torch.randn(40, 2) @ torch.randn(2, 6) + 1,
    )  # Of two directions, as PEFT keeps no more for the next.
    settings = config(r=2, init_lora_weights="eva", eva_config=peft.EvaConfig(rho=1.0))
    theirs = peft.get_peft_model(copy.deepcopy(base), settings)
    options = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None, "show_progress_bar": False}
    peft.initialize_lora_eva_weights(theirs, [{"x": x}] * 4, **options)
    ours = copy.deepcopy(base)
    patch = adapters.inject(ours, LoRA(rank=2, init="eva"))
    adapters.initialize(patch, [x])
    for path in "ab":
        a = theirs.base_model.model.get_submodule(path).lora_A["default"].weight
        close(span(patch.state_dict()[f"{path}.lora_A.weight"]), span(a), 1e-3)  # PEFT's comes from a few passes.


@pytest.mark.parametrize(("init", "mode"), [("corda", "ipm"), ("corda_kpm", "kpm")])
def test_corda_moves_what_is_moved_there(init: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT needs a package for this that it does not ask for, and cannot load what it saves."""
    monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))
    from peft.tuners.lora.corda import preprocess_corda

    base, x = Net(), torch.randn(40, 6)
    settings = config(r=2, init_lora_weights="corda", corda_config=CordaConfig(corda_method=mode))
    model = copy.deepcopy(base)
    preprocess_corda(model, settings, run_model=lambda: model(x))
    theirs = peft.get_peft_model(model, settings)
    ours = copy.deepcopy(base)
    patch = adapters.inject(ours, LoRA(rank=2, alpha=8, init=init))
    adapters.initialize(patch, [x])
    state = patch.state_dict()
    for path in "ab":
        layer = theirs.base_model.model.get_submodule(path)
        product = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
        close(state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"], product.detach(), 1e-4)


def test_lora_ga_takes_the_subspaces_taken_there_and_can_be_saved(tmp_path: Path) -> None:
    """PEFT's lengths of A and B are not those of the paper, and what it saves, it loads onto another weight.

    The paper (arXiv:2407.05000) gives A and B the same length, √d_out / γ squared. PEFT leaves A at 1, and multiplies
    B by the singular values of the gradient. And it takes the start out of the weight when it makes the adapter, but
    not when it loads a file of it.
    """
    base, x = Net(), torch.randn(20, 6)
    settings = config(r=2, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    model = copy.deepcopy(base)
    preprocess_loraga(model, settings, lambda: model(x).square().mean().backward())
    theirs = peft.get_peft_model(model, settings).eval()
    ours = copy.deepcopy(base)
    patch = adapters.inject(ours, LoRA(rank=2, alpha=8, init="lora_ga"))
    adapters.initialize(patch, [x], lambda model, batch: model(batch).square().mean())
    state = patch.state_dict()
    for path in "ab":
        a, b = (getattr(theirs.base_model.model.get_submodule(path), f"lora_{n}")["default"].weight for n in "AB")
        own_a, own_b = state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]
        close(span(own_a), span(a), 1e-4)
        close(span(own_b.T), span(b.T), 1e-4)
        expected = len(b) ** 0.5 / 16
        assert abs(float(own_a[0].square().sum()) - expected) < 1e-4 > abs(float(own_b[:, 0].square().sum()) - expected)
        assert abs(float(a[0].square().sum()) - 1) < 1e-4
        assert float(b[:, 0].square().sum()) < expected / 100
    close(theirs(x), base(x))
    theirs.save_pretrained(tmp_path / "theirs")
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "theirs").eval()
    assert float((loaded(x) - theirs(x)).abs().max()) > 0.01
    with pytest.raises(weights.FileFormatError, match="init_lora_weights='lora_ga' is not supported"):
        adapters.load(copy.deepcopy(base), tmp_path / "theirs")
    perturb(patch)
    patch.save_pretrained(tmp_path / "ours")
    close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()(x), ours(x))


def test_olora_starts_on_a_transposed_layer() -> None:
    """PEFT decomposes the transpose there, so that A and B have each other's shapes: it crashes."""
    base, x = One(Conv1D(8, 6)), torch.randn(3, 6)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        wrapped(base, config(r=2, init_lora_weights="olora", target_modules=["layer"]))(x)
    ours = copy.deepcopy(base)
    patch = adapters.inject(ours, LoRA(rank=2, alpha=3, init="olora"))
    close(ours(x), base(x))
    q, r = torch.linalg.qr(base.layer.weight.detach().T)
    close(patch.state_dict()["layer.lora_A.weight"], r[:2])
    close(patch.state_dict()["layer.lora_B.weight"], q[:, :2])


# DoRA


def test_lengths_under_either_name_are_read(tmp_path: Path) -> None:
    base, x = Net(), torch.randn(3, 6)
    theirs = wrapped(base, config(r=2, use_dora=True, alpha_pattern={"a": 5}, rank_pattern={"b": 3}))
    move(theirs)
    theirs.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    renamed = {
        f"{key}.weight" if key.endswith("lora_magnitude_vector") else key: t.clone()
        for key, t in weights.open(path).items()
    }
    weights.save(renamed, path)
    ours = copy.deepcopy(base)
    patch = adapters.load(ours, tmp_path)
    close(ours(x), theirs(x))
    patch.save_pretrained(tmp_path / "ours")
    assert any(key.endswith("lora_magnitude_vector") for key in weights.open(tmp_path / "ours" / path.name))
    close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()(x), theirs(x))


def by_hand(layer: nn.Conv2d, state: dict[str, Tensor], scaling: float) -> nn.Conv2d:
    """The convolution with the weight that LoRA, or DoRA if it has a magnitude, says."""
    weight = layer.weight.flatten(1) + scaling * state["layer.lora_B.weight"].flatten(1) @ state[
        "layer.lora_A.weight"
    ].flatten(1)
    if (magnitude := state.get("layer.lora_magnitude_vector")) is not None:
        weight = magnitude.view(-1, 1) * weight / weight.norm(dim=1, keepdim=True)
    made = copy.deepcopy(layer)
    with torch.no_grad():
        made.weight.copy_(weight.view_as(layer.weight))
    return made


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"dilation": 2}, "crashes"),
        ({"padding": 1, "padding_mode": "circular"}, "merged is another"),
        ({"groups": 2}, "cannot be merged"),
    ],
)
def test_they_have_the_geometry_of_the_convolution(method: type[LoRA], options: dict[str, Any], wrong: str) -> None:
    """PEFT's A has neither the dilation nor the padding mode nor the groups of the convolution."""
    base, x = One(nn.Conv2d(4, 6, 3, **options)).double(), torch.randn(2, 4, 7, 7).double()
    theirs = wrapped(base, config(r=2, use_dora=method is DoRA, target_modules=["layer"]))
    move(theirs)
    if wrong == "crashes":
        with pytest.raises(RuntimeError, match="must match the size"):
            theirs(x)
    elif wrong == "cannot be merged":
        with pytest.raises(NotImplementedError, match="groups > 1"):
            theirs.merge_adapter()
    else:
        unmerged = theirs(x)
        theirs.merge_adapter()
        assert float((theirs(x) - unmerged).abs().max()) > 0.1
    ours = copy.deepcopy(base)
    patch = adapters.inject(ours, method(rank=2, alpha=3))
    perturb(patch)
    expected = by_hand(base.layer, patch.state_dict(), 1.5)(x)
    close(ours(x), expected, 1e-10)
    patch.merge()
    close(ours(x), expected, 1e-10)


def test_dora_starts_where_a_row_is_zero() -> None:
    """PEFT divides by the length of a row: an output that is always its bias is NaN from the start."""
    base, x = One(nn.Linear(4, 3)), torch.randn(2, 4)
    with torch.no_grad():
        base.layer.weight[1] = 0
    assert wrapped(base, config(r=2, use_dora=True, target_modules=["layer"]))(x)[:, 1].isnan().all()
    ours = copy.deepcopy(base)
    adapters.inject(ours, DoRA(rank=2))
    close(ours(x), base(x))


# AdaLoRA


def adalora(base: nn.Module, **settings: Any) -> Any:
    return wrapped(base, config(peft.AdaLoraConfig, **{"init_r": 4, "lora_alpha": 6, "total_step": 12, **settings}))


def test_the_divisor_of_adalora_is_a_constant(tmp_path: Path) -> None:
    """PEFT leaves its `ranknum` among the parameters an optimizer gets, and does not save what became of it."""
    base, x = Net().double(), torch.randn(3, 6).double()
    theirs = adalora(base)
    move(theirs)
    found = [parameter for name, parameter in theirs.named_parameters() if "ranknum" in name]
    assert all(parameter.requires_grad for parameter in found)
    theirs(x).square().mean().backward()
    torch.optim.SGD(found, lr=100.0).step()
    trained = theirs(x)
    theirs.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    assert not torch.allclose(loaded(x), trained, rtol=1e-3, atol=1e-3)
    ours = copy.deepcopy(base)
    adapters.load(ours, tmp_path)
    close(ours(x), loaded(x), 1e-8)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [({"groups": 2}, "crashes"), ({"padding": 1, "padding_mode": "circular"}, "merged is another")],
)
def test_adalora_has_the_geometry_of_the_convolution(options: dict[str, Any], wrong: str) -> None:
    """PEFT's has a column for each input of all groups, and pads with zeros."""
    base, x = One(nn.Conv2d(4, 6, 3, **options)).double(), torch.randn(2, 4, 7, 7).double()
    theirs = adalora(base, target_modules=["layer"])
    move(theirs)
    if wrong == "crashes":
        with pytest.raises(RuntimeError, match="is invalid for input of size"):
            theirs(x)
    else:
        unmerged = theirs(x)
        theirs.merge_adapter()
        assert float((theirs(x) - unmerged).abs().max()) > 0.1
    ours = copy.deepcopy(base)
    patch = adapters.inject(ours, AdaLoRA(rank=2, alpha=3))
    perturb(patch)
    a, b, e = (patch.state_dict()[f"layer.lora_{name}"] for name in "ABE")
    changed = copy.deepcopy(base)
    with torch.no_grad():
        changed.layer.weight += 3 / (2 + 1e-5) * torch.einsum("ok,k,ki->oi", b, e[:, 0], a).view_as(base.layer.weight)
    close(ours(x), changed(x), 1e-10)


def test_an_alpha_of_nothing_is_the_rank(tmp_path: Path) -> None:
    base, x = Net().double(), torch.randn(3, 6).double()
    theirs = adalora(base, lora_alpha=0)
    move(theirs)
    theirs.save_pretrained(tmp_path)
    ours = copy.deepcopy(base)
    adapters.load(ours, tmp_path)
    close(ours(x), theirs(x), 1e-8)


def trained_together(model: nn.Module, steps: int, **schedule: Any) -> Iterator[tuple[Any, adapters.Patch]]:
    """The same steps of training with PEFT's allocator and with ours, from the same tensors."""
    names = {"target_rank": "target_r", "warmup": "tinit", "final": "tfinal", "interval": "deltaT"}
    theirs = adalora(model, **{names.get(name, name): value for name, value in schedule.items()})
    move(theirs)
    patch = adapters.inject(model, AdaLoRA(rank=4, alpha=6))
    patch.load_state_dict(
        {
            f"{path}.{name}": getattr(theirs.base_model.model.get_submodule(path), name)["default"]
            for path in "ab"
            for name in ("lora_A", "lora_B", "lora_E")
        }
    )
    allocator = RankAllocator(patch, total_steps=12, **schedule)
    trained = [p for name, p in theirs.named_parameters() if p.requires_grad and "ranknum" not in name]
    optimizers = [torch.optim.Adam(parameters, lr=0.02) for parameters in (trained, patch.parameters())]
    for number in range(steps):
        x = torch.randn(6, 6, dtype=torch.float64) * 10 ** torch.randn(6, dtype=torch.float64)  # Gradients that differ.
        for run, optimizer in zip((theirs, model), optimizers, strict=True):
            optimizer.zero_grad()
            run(x).square().mean().backward()
            optimizer.step()
        theirs.base_model.update_and_allocate(number)
        allocator.step(number)
        yield theirs, patch


@pytest.mark.parametrize(
    "schedule",
    [
        {"target_rank": 1},
        {"target_rank": 2, "warmup": 2, "final": 4},
        {"target_rank": 1, "interval": 3},
        {"target_rank": 1, "warmup": 6, "beta1": 0.3, "beta2": 0.95},
    ],
)
def test_the_allocator_prunes_what_is_pruned_there_step_by_step(schedule: dict[str, Any], tmp_path: Path) -> None:
    base = Net().double()
    final = schedule.get("final", 0)
    model, seen = copy.deepcopy(base), set()
    for theirs, patch in trained_together(model, 12 if final else 13, **schedule):
        state = patch.state_dict()
        for path in "ab":
            layer = theirs.base_model.model.get_submodule(path)
            for name in ("lora_A", "lora_B", "lora_E"):
                close(state[f"{path}.{name}"], getattr(layer, name)["default"].detach(), 1e-9)
        seen.add(sum(int((state[f"{path}.lora_E"] != 0).sum()) for path in "ab"))
    assert len(seen) >= 3
    assert min(seen) == 2 * schedule["target_rank"]
    # Files of the pruned one, both ways.
    x = torch.randn(5, 6, dtype=torch.float64)
    theirs.save_pretrained(tmp_path / "theirs")
    patch.save_pretrained(tmp_path / "ours")
    loaded = copy.deepcopy(base)
    adapters.load(loaded, tmp_path / "theirs")
    close(loaded(x), theirs(x), 1e-8)
    close(peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").eval()(x), model(x), 1e-8)
    one, other = (weights.open(tmp_path / who / "adapter_model.safetensors") for who in ("theirs", "ours"))
    # Of a layer without any rank left PEFT writes empty tensors: here it keeps those that have no effect.
    assert all(t.shape == other[key].shape for key, t in one.items() if t.numel())


def test_an_allocator_with_nothing_to_prune(tmp_path: Path) -> None:
    """PEFT asks for the 0th smallest importance, and crashes."""
    steps = trained_together(Net().double(), 3, target_rank=4)
    with pytest.raises(RuntimeError, match="selected number k out of range"):
        list(steps)
    base, x = Net().double(), torch.randn(3, 6).double()
    patch = adapters.inject(base, AdaLoRA(rank=4))
    perturb(patch)
    allocator = RankAllocator(patch, total_steps=12, target_rank=4)
    for number in range(3):
        base(x).square().mean().backward()
        allocator.step(number)
    assert all(t.all() for name, t in patch.state_dict().items() if name.endswith("lora_E"))


def test_the_regulariser_is_the_same() -> None:
    base = Net().double()
    for theirs, patch in trained_together(base, 1, target_rank=1):
        found = RankAllocator(patch, total_steps=12).orthogonality()

        class Loss:
            loss = torch.zeros((), dtype=torch.float64)

        theirs.base_model.model.forward = lambda: Loss
        close(theirs.base_model.forward().loss, 0.5 * found, 1e-9)
