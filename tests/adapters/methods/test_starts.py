"""Starts of LoRA that are found from data, against closed forms; and that finding them leaves nothing behind."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapters
import weights
from adapters import AdapterError, DoRA, LayerMismatchError, LoRA, PatchStateError, TargetError
from tests.adapters.models import perturb, snapshot


class Net(nn.Module):
    """Two layers, dropout between them, and a third that is not always run."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(5, 7)
        self.norm = nn.BatchNorm1d(7)
        self.drop = nn.Dropout(0.5)
        self.b = nn.Linear(7, 6)
        self.idle = nn.Linear(6, 6)

    def forward(self, x: Tensor, idle: bool = True) -> Tensor:
        return self.b(self.drop(torch.tanh(self.norm(self.a(x)))))


def made() -> tuple[Net, list[Tensor]]:
    model = Net().double().train()
    model.drop.eval()
    model.a.bias.requires_grad_(False)
    return model, [torch.randn(size, 5, dtype=torch.float64) + 3 for size in (9, 4, 11)]


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def inject(model: nn.Module, init: str, targets: Any = ("a", "b"), **numbers: Any) -> adapters.Patch:
    method = LoRA(**{"rank": 2, "alpha": 3, "init": init, **numbers})
    return adapters.inject(model, method, list(targets), freeze_base=False)


def inputs_of(model: Net, batches: list[Tensor], path: str) -> Tensor:
    model = copy.deepcopy(model).eval()
    x = torch.cat(batches)
    return x if path == "a" else torch.tanh(model.norm(model.a(x)))


def span(rows: Tensor) -> Tensor:
    """The projection onto the space of the rows."""
    q = torch.linalg.qr(rows.mT).Q
    return q @ q.mT


INITS = ("eva", "corda", "corda_kpm", "lora_ga", "loftq")


@pytest.mark.parametrize("init", INITS)
def test_finding_a_start_leaves_nothing_behind(init: str) -> None:
    model, batches = made()
    patch = inject(model, init)
    with torch.no_grad():
        base = inputs_of(model, batches, "a")
        expected = copy.deepcopy(model).eval()(base)
    ours = {id(parameter) for parameter in patch.parameters()}
    before = snapshot(model)
    names = [name for name, _ in (*model.named_parameters(remove_duplicate=False), *model.named_buffers())]
    own = {name for name in names if "lora_" in name}
    originals = {f"{path}.weight": model.get_submodule(path).weight.detach() + 0.1 for path in "ab"}
    adapters.initialize(patch, batches, loss, originals=originals)
    changed = [one for one, other in zip(before, snapshot(model), strict=True) if one != other]
    assert {item[0] for item in changed} <= own  # Values of A and B, and nothing else.
    assert changed
    assert {id(parameter) for parameter in patch.parameters()} == ours
    assert all(parameter.grad is None for parameter in model.parameters())
    if init != "loftq":
        with torch.no_grad():
            torch.testing.assert_close(copy.deepcopy(model).eval()(base), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_all_or_nothing_when_a_batch_raises(init: str) -> None:
    model, batches = made()
    patch = inject(model, init)
    before = snapshot(model)

    def broken() -> Iterator[Tensor]:
        yield batches[0]
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        adapters.initialize(patch, broken(), loss)
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        adapters.initialize(patch, [*batches, torch.randn(3, 4).double()], loss)
    assert snapshot(model) == before


# Closed forms


@pytest.mark.parametrize("path", ["a", "b"])
def test_eva_takes_the_directions_of_the_most_variance(path: str) -> None:
    model, batches = made()
    patch = inject(model, "eva")
    adapters.initialize(patch, batches)
    x = inputs_of(model, batches, path)
    vt = torch.linalg.svd(x - x.mean(0)).Vh
    state = patch.state_dict()
    a, b = state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]
    torch.testing.assert_close((a @ vt[:2].T).abs(), torch.eye(2).double(), rtol=1e-9, atol=1e-9)
    assert not b.any()


@pytest.mark.parametrize("init", ["corda", "corda_kpm"])
@pytest.mark.parametrize("path", ["a", "b"])
def test_corda_takes_what_matters_the_most_or_the_least_to_the_inputs(init: str, path: str) -> None:
    model, batches = made()
    patch = inject(model, init)
    weight = model.get_submodule(path).weight.detach().clone()
    adapters.initialize(patch, batches)
    x = inputs_of(model, batches, path)
    c = x.T @ x / len(x)
    c += 0.01 * c.diagonal().mean() * torch.eye(len(c))
    u, s, vt = torch.linalg.svd(weight @ c, full_matrices=False)
    chosen = range(2) if init == "corda" else range(len(s) - 2, len(s))
    part = sum(s[k] * torch.outer(u[:, k], vt[k]) for k in chosen) @ torch.linalg.inv(c)
    state = patch.state_dict()
    product = 1.5 * state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]
    torch.testing.assert_close(product, part, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("path", ["a", "b"])
def test_lora_ga_takes_singular_vectors_of_the_gradient(path: str) -> None:
    model, batches = made()
    twin = copy.deepcopy(model).eval()
    sum(loss(twin, x) for x in batches).backward()  # type: ignore[union-attr]
    patch = inject(model, "lora_ga")
    adapters.initialize(patch, batches, loss)
    u, _, vt = torch.linalg.svd(twin.get_submodule(path).weight.grad)
    state = patch.state_dict()
    a, b = state[f"{path}.lora_A.weight"], state[f"{path}.lora_B.weight"]
    outputs = len(b)
    torch.testing.assert_close(a @ a.T, outputs**0.5 / 16 * torch.eye(2).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(b.T @ b, outputs**0.5 / 16 * torch.eye(2).double(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(span(a), span(vt[:2]), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(span(b.T), span(u[:, 2:4].T), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("alpha", [3.0, -3.0])
def test_loftq_makes_up_for_quantising(alpha: float, tmp_path: Path) -> None:
    model, _ = made()
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights.save(original, tmp_path / "original.safetensors")
    with torch.no_grad():
        for path in "ab":
            model.get_submodule(path).weight.mul_(4).round_().div_(4)
    patch = inject(model, "loftq", alpha=alpha)
    adapters.initialize(patch, originals=weights.open(tmp_path / "original.safetensors"))
    for path in "ab":
        present = model.get_submodule(path).base.weight.detach()
        u, s, vt = torch.linalg.svd(original[f"{path}.weight"] - present, full_matrices=False)
        nearest = present + (u[:, :2] * s[:2]) @ vt[:2]
        with torch.no_grad():
            torch.testing.assert_close(model.get_submodule(path).weight, nearest, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), nn.Conv1d(4, 6, 2, dilation=2)])
def test_the_inputs_of_a_convolution_are_its_windows(layer: Any) -> None:
    """What the rows of its weight are multiplied by, channels and kernel in their order, all groups alike."""
    model = nn.Sequential(layer).double()
    spatial = (5,) * len(layer.kernel_size)
    x = torch.randn(3, 4, *spatial, dtype=torch.float64)
    patch = adapters.inject(model, LoRA(rank=2, init="eva"))
    adapters.initialize(patch, [x[:1], x[1:]])
    unfolded = []
    inputs = 4 // layer.groups
    for group in range(layer.groups):
        # Each window as the output of a convolution whose weight picks one input.
        picks = torch.eye(inputs * torch.Size(layer.kernel_size).numel(), dtype=torch.float64)
        picks = picks.view(-1, inputs, *layer.kernel_size)
        function = nn.functional.conv2d if len(spatial) == 2 else nn.functional.conv1d
        part = x[:, group * inputs : (group + 1) * inputs]
        windows = function(part, picks, stride=layer.stride, padding=layer.padding, dilation=layer.dilation)
        unfolded.append(windows.flatten(2).mT.flatten(0, 1))
    rows = torch.cat(unfolded)
    vt = torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh
    a = patch.state_dict()["0.lora_A.weight"].flatten(1)
    torch.testing.assert_close(span(a), span(vt[:2]), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("init", ["eva", "corda", "lora_ga"])
def test_other_layers_and_other_patches(init: str) -> None:
    """A transposed weight, tied layers, and a patch that acts besides: the start changes nothing of the output."""
    model = nn.Sequential(Conv1D(6, 5), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double()
    model[4].weight = model[2].weight
    x = torch.randn(8, 5, dtype=torch.float64)
    other = adapters.inject(model, LoRA(rank=1), name="other")
    perturb(other)
    expected = model(x)
    patch = adapters.inject(model, LoRA(rank=2, init=init))
    before = patch.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    adapters.initialize(patch, [x], loss)
    torch.testing.assert_close(model(x), expected, rtol=1e-11, atol=1e-11)
    assert all(not torch.equal(tensor, before[name]) for name, tensor in patch.state_dict().items() if "_A" in name)


def test_dora_starts_anew_with_the_lengths_it_has_then() -> None:
    model, batches = made()
    patch = adapters.inject(model, DoRA(rank=2, init="loftq"), ["a"])
    original = model.a.weight.detach() + torch.randn(7, 5) * 0.1
    adapters.initialize(patch, originals={"a.weight": original})
    u, s, vt = torch.linalg.svd(original - model.a.base.weight.detach(), full_matrices=False)
    with torch.no_grad():
        nearest = model.a.base.weight + (u[:, :2] * s[:2]) @ vt[:2]
        torch.testing.assert_close(model.a.weight, nearest, rtol=1e-9, atol=1e-9)
    patch.eject()
    patch = adapters.inject(model, DoRA(rank=2, init="corda"), ["a", "b"])
    expected = copy.deepcopy(model).eval()(batches[0])
    adapters.initialize(patch, batches)
    torch.testing.assert_close(copy.deepcopy(model).eval()(batches[0]), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("init", ["eva", "corda", "corda_kpm", "lora_ga", "loftq"])
def test_files_hold_the_outcome(init: str, tmp_path: Path) -> None:
    model, batches = made()
    model.eval()
    patch = inject(model, init, rslora=True)
    originals = {f"{path}.weight": model.get_submodule(path).weight.detach() + 0.1 for path in "ab"}
    adapters.initialize(patch, batches, loss, originals=originals)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    expected = model(batches[0])
    patch.save_pretrained(tmp_path)
    patch.eject()
    adapters.load(model, tmp_path)
    torch.testing.assert_close(model(batches[0]), expected, rtol=1e-10, atol=1e-10)


def test_only_what_starts_from_data_is_touched_and_batches_may_be_named() -> None:
    model, batches = made()
    patch = adapters.inject(model, {"a": LoRA(rank=2, init="eva"), "b": LoRA(rank=2)})
    before = patch.state_dict()["b.lora_A.weight"].clone()
    adapters.initialize(patch, ({"x": x, "idle": False} for x in batches))
    assert torch.equal(patch.state_dict()["b.lora_A.weight"], before)
    a = patch.state_dict()["a.lora_A.weight"].clone()
    adapters.initialize(patch, [(x, False) for x in batches])
    torch.testing.assert_close(patch.state_dict()["a.lora_A.weight"], a)


# Bad use


def refused(
    error: type[Exception], match: str, init: str, *args: Any, targets: Any = ("a", "b"), **options: Any
) -> None:
    model, _ = made()
    numbers = {name: options.pop(name) for name in ("rank", "alpha") if name in options}
    patch = inject(model, init, targets, **numbers)
    before = snapshot(model)
    with pytest.raises(error, match=match):
        adapters.initialize(patch, *args, **options)
    assert snapshot(model) == before


X = torch.randn(9, 5, dtype=torch.float64)
CASES: dict[str, Callable[[], None]] = {
    "no data": lambda: refused(
        AdapterError, "No branch of the patch 'default' is initialized from data", "kaiming", [X]
    ),
    "one batch": lambda: refused(AdapterError, "was given one batch", "eva", batches=torch.randn(9, 5)),
    "no batches": lambda: refused(AdapterError, "was given no batches", "eva"),
    "not reached": lambda: refused(
        TargetError, "idle cannot be initialized: the batches do not reach it", "eva", [X], targets=["a", "idle"]
    ),
    "not reached by the gradient": lambda: refused(
        TargetError,
        "idle cannot be initialized: the batches do not reach it",
        "lora_ga",
        [X],
        loss,
        targets=["a", "idle"],
    ),
    "too few": lambda: refused(
        TargetError, "a cannot be initialized: 2 inputs are too few for a rank of 2", "eva", [X[:2]]
    ),
    "rank of inputs": lambda: refused(
        TargetError, "a cannot be initialized: a rank of 6 is more", "corda", [X], rank=6
    ),
    "rank of gradients": lambda: refused(
        TargetError, "a cannot be initialized: the rank can be 2 at most", "lora_ga", [X], loss, rank=3
    ),
    "not finite": lambda: refused(
        TargetError, "a cannot be initialized: its inputs or gradients are not finite", "eva", [X / 0]
    ),
    "zeros": lambda: refused(TargetError, "a cannot be initialized: all of its inputs are zero", "corda", [X * 0]),
    "no loss": lambda: refused(AdapterError, "needs the gradient of a loss: pass run=", "lora_ga", [X]),
    "no originals": lambda: refused(AdapterError, "pass originals=", "loftq"),
    "other originals": lambda: refused(
        LayerMismatchError, "a.weight is missing", "loftq", originals={"b.weight": torch.zeros(6, 7)}
    ),
    "originals of another shape": lambda: refused(
        LayerMismatchError,
        r"a.weight is \(5, 7\) instead of \(7, 5\)",
        "loftq",
        originals={"a.weight": torch.zeros(5, 7)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_use_is_refused_in_a_sentence(case: str) -> None:
    CASES[case]()


def test_what_has_no_inputs_or_no_alpha_is_refused_at_injection() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(3, 4), "up": nn.ConvTranspose1d(2, 2, 2)})
    for path in model:
        with pytest.raises(TargetError, match=f"{path} has no inputs that its weight is multiplied by"):
            adapters.inject(model, LoRA(rank=1, init="corda"), path)
    with pytest.raises(AdapterError, match="LoRA needs an alpha other than 0 for init='pissa', not 0"):
        LoRA(alpha=0, init="pissa")


def test_the_patch_has_to_be_there_and_apart() -> None:
    model, batches = made()
    patch = inject(model, "eva")
    patch.merge()
    with pytest.raises(PatchStateError, match="has to be injected, and not merged"):
        adapters.initialize(patch, batches)
    patch.eject()
    with pytest.raises(PatchStateError, match="has to be injected, and not merged"):
        adapters.initialize(patch, batches)
    other = adapters.inject(model, LoRA(rank=1), ["a"], name="other")
    patch = inject(model, "lora_ga")
    other.merge()
    with pytest.raises(PatchStateError, match="a has another patch merged in"):
        adapters.initialize(patch, batches, loss)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_a_rank_that_the_weight_does_not_have_is_refused(init: str) -> None:
    model, _ = made()
    before = snapshot(model)
    with pytest.raises(TargetError, match="b is 6 × 7, too small for a rank of 7"):
        adapters.inject(model, LoRA(rank=7, init=init), "b")
    assert snapshot(model) == before
