"""AdaLoRA against its formula, and the allocator of its ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import AdaLoRA, AdapterError, LoRA, Patch, RankAllocator, TargetError
from tests.adapters.models import perturb


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.floats(0.1, 9), st.integers(0, 2**20))
def test_linear_and_convolution(inputs: int, outputs: int, rank: int, alpha: float, seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    model = nn.ModuleDict({"linear": nn.Linear(inputs, outputs), "conv": nn.Conv1d(inputs, outputs, 2)}).double()
    x = torch.randn(3, inputs, 4, dtype=torch.float64)
    before = {name: layer(x if name == "conv" else x.mT) for name, layer in model.items()}
    patch = adapters.inject(model, AdaLoRA(rank=rank, alpha=alpha), nn.Module)
    for name, output in before.items():
        torch.testing.assert_close(model[name](x if name == "conv" else x.mT), output, rtol=1e-12, atol=1e-12)
    perturb(patch, seed)
    state = patch.state_dict()
    for name in ("linear", "conv"):
        a, b, e = (state[f"{name}.lora_{letter}"] for letter in "ABE")
        delta = torch.einsum("ok,k,ki->oi", b, e[:, 0], a) * alpha / (rank + 1e-5)
        with torch.no_grad():
            expected = model[name].base.weight + delta.view_as(model[name].base.weight)
            torch.testing.assert_close(model[name].weight, expected, rtol=1e-10, atol=1e-10)


def test_what_does_not_fit_is_refused() -> None:
    for numbers, match in (
        ({"rank": 0}, "a rank that is an integer of 1 or more"),
        ({"kept": 13}, "a kept of 0 up to the rank, 12, not 13"),
        ({"kept": 1.5}, "a kept of 0 up to the rank"),
        ({"alpha": float("nan")}, "an alpha that is a finite number"),
        ({"dropout": 1.0}, "a dropout of 0 or more and less than 1"),
    ):
        with pytest.raises(AdapterError, match=match):
            AdaLoRA(**numbers)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="give it a AdaLoRA with dropout=0"):
        adapters.inject(nn.Sequential(nn.Linear(2, 2)), AdaLoRA(dropout=0.1))


def test_files_leave_out_what_was_pruned(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double(), torch.randn(3, 5).double()
    base = model(x)
    patch = adapters.inject(model, AdaLoRA(rank=4, alpha=7))
    perturb(patch)
    with torch.no_grad():
        model[0].branches[0].lora_E[[0, 2]] = 0
    expected = model(x)
    patch.save_pretrained(tmp_path)
    patch.eject()
    loaded = adapters.load(model, tmp_path)
    assert {name: tuple(t.shape) for name, t in loaded.state_dict().items() if name.startswith("0.")} == {
        "0.lora_A": (2, 5),
        "0.lora_B": (6, 2),
        "0.lora_E": (2, 1),
    }
    torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
    loaded.eject()
    adapters.inject(model, AdaLoRA(rank=4)).save_pretrained(tmp_path / "new")  # All of E is zero before training.
    model[0].eject()
    model[2].eject()
    adapters.load(model, tmp_path / "new")
    assert torch.equal(model(x), base)


# The allocator


def injected(rank: int = 4) -> tuple[nn.Module, Patch, Tensor]:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
    patch = adapters.inject(model, AdaLoRA(rank=rank))
    perturb(patch)
    return model, patch, torch.randn(8, 5)


def left(patch: Patch) -> int:
    return sum(int((t != 0).sum()) for name, t in patch.state_dict().items() if name.endswith("lora_E"))


def train(model: nn.Module, patch: Patch, x: Tensor, allocator: RankAllocator, steps: int) -> list[int]:
    optimizer = torch.optim.SGD(patch.parameters(), lr=0.01)
    ranks = []
    for number in range(steps):
        optimizer.zero_grad()
        (model(x).square().mean() + 0.1 * allocator.orthogonality()).backward()
        optimizer.step()
        allocator.step(number)
        ranks.append(left(patch))
    return ranks


def test_the_budget_falls_with_the_cube_and_stays() -> None:
    model, patch, x = injected()
    allocator = RankAllocator(patch, total_steps=20, target_rank=1, warmup=4, final=6, interval=3)
    ranks = train(model, patch, x, allocator, 25)
    assert ranks[:6] == [8] * 6  # Warm until 4, and 6 is the first multiple of 3 after.
    for number in (6, 9, 12):
        assert ranks[number] == allocator.budget(number) == int(6 * (1 - (number - 4) / 10) ** 3 + 2)
    assert ranks[14:] == [2] * 11  # The gradient does not bring back in the end what was pruned.
    assert left(patch) == 2


@pytest.mark.parametrize("seed", range(8))
def test_the_least_important_go_first(seed: int) -> None:
    """After one step importance is (p g)² of each entry, with a factor that all have in common."""
    torch.default_generator.manual_seed(seed)
    model, patch, x = injected(rank=8)
    allocator = RankAllocator(patch, total_steps=2, target_rank=1)
    model(x).square().mean().backward()
    scores = {}
    for path in ("0", "2"):
        (branch,) = model.get_submodule(path).branches
        s = {name: (t * t.grad).square().detach() for name, t in branch.named_parameters()}
        for k in range(8):
            scores[path, k] = float(s["lora_E"][k] + s["lora_A"][k].mean() + s["lora_B"][:, k].mean())
    allocator.step(0)
    assert left(patch) == 16
    allocator.step(1)
    kept = sorted(scores, key=lambda place: scores[place])[-int(14 / 8 + 2) :]
    state = patch.state_dict()
    assert {place for place in scores if state[f"{place[0]}.lora_E"][place[1]] != 0} == set(kept)


def test_orthogonality() -> None:
    _, patch, _ = injected()
    errors = []
    for name, t in patch.state_dict().items():
        if name.endswith(("A", "B")):
            gram = t @ t.T if name.endswith("A") else t.T @ t
            errors.append((gram - torch.eye(4)).square().sum().sqrt())
    found = RankAllocator(patch, total_steps=10).orthogonality()
    torch.testing.assert_close(found, sum(errors) / 4)  # type: ignore[arg-type]
    assert found.requires_grad


@pytest.mark.parametrize(
    ("numbers", "match"),
    [
        ({"total_steps": "10"}, "have to be integers"),
        ({"total_steps": 10, "target_rank": 2.5}, "have to be integers"),
        ({"total_steps": 0}, "leave none to prune in"),
        ({"total_steps": 10, "warmup": 6, "final": 4}, "6 of warmup and 4 final ones leave none"),
        ({"total_steps": 10, "interval": 0}, "the interval is 1 or more"),
        ({"total_steps": 10, "target_rank": -1}, "may be negative"),
        ({"total_steps": 10, "beta1": 1.0}, "beta1 and beta2 have to be between 0 and 1, not 1.0 and 0.85"),
    ],
)
def test_numbers_out_of_range(numbers: dict[str, Any], match: str) -> None:
    with pytest.raises(AdapterError, match=match):
        RankAllocator(injected()[1], **numbers)


def test_use_at_the_wrong_time() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(AdapterError, match="'a' has no AdaLoRA"):
        RankAllocator(adapters.inject(model, LoRA(rank=2), name="a"), total_steps=3)
    allocator = RankAllocator(injected()[1], total_steps=3)
    with pytest.raises(AdapterError, match=r"call step\(\) after backward\(\)"):
        allocator.step(0)


def test_nothing_is_pruned_where_the_target_is_all_there_is() -> None:
    model, patch, x = injected()
    assert train(model, patch, x, RankAllocator(patch, total_steps=4, target_rank=9), 6) == [8] * 6
