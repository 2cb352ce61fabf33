"""`merge_and_eject` adds low-rank updates in place where a weight is one layer's own, and nowhere else."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters import LoRA
from adapters.methods.core.tensors import Tensors


class Net(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.conv = nn.Conv2d(2, 4, 3, groups=2)
        self.turned = nn.ConvTranspose2d(2, 2, 2)
        self.words = nn.Embedding(5, 6)
        self.tied, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
        self.other.weight = self.tied.weight
        self.to(dtype)


def patched(model: nn.Module, **options: object) -> adapters.Patch:
    patch = adapters.inject(model, LoRA(rank=2, alpha=3), scale=0.7, **options)  # type: ignore[arg-type]
    torch.default_generator.manual_seed(1)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_(std=0.3)
    return patch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_weights_are_those_of_a_merge(dtype: torch.dtype) -> None:
    model = Net(dtype)
    twin = copy.deepcopy(model)
    merged, folded = patched(twin), patched(model)
    merged.merge()
    folded.merge_and_eject()
    expected = {name: layer.weight for name, layer in merged.targets.items()}
    assert expected.keys() == dict(model.named_children()).keys()
    for name, layer in model.named_children():
        assert torch.equal(layer.weight, expected[name]), name


def test_a_weight_of_one_layer_stays_the_same_object() -> None:
    model = Net()
    before = {name: layer.weight for name, layer in model.named_children()}
    patched(model).merge_and_eject()
    same = {name for name, layer in model.named_children() if layer.weight is before[name]}
    assert same == {"first", "conv", "words"}
    assert model.tied.weight is model.other.weight


def test_what_shares_memory_with_a_weight_is_left_alone() -> None:
    model = Net()
    view = nn.Linear(6, 6, bias=False)
    view.weight = nn.Parameter(model.first.weight.data)
    model.view = view
    before = view.weight.detach().clone()
    patched(model, targets="first").merge_and_eject()
    assert torch.equal(view.weight, before)
    assert not torch.equal(model.first.weight, before)


@dataclass(frozen=True)
class Failing(LoRA):
    """Its update cannot be computed for the layer of 4 outputs."""

    key = "failing"

    def factors(self, t: Tensors) -> tuple[Tensor, Tensor]:
        if t.shape[0] == 4:
            raise RuntimeError("no")
        return super().factors(t)


def test_nothing_is_added_unless_everything_can_be() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 4))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    patch = adapters.inject(model, Failing(rank=1))
    for parameter in patch.parameters():
        nn.init.ones_(parameter)
    with pytest.raises(RuntimeError, match="no"):
        patch.merge_and_eject()
    patch.eject()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_other_patches_stay_and_act_on_the_new_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    first = patched(model, name="first")
    second = patched(model, name="second")
    x = torch.randn(3, 4)
    expected = model(x)
    first.merge_and_eject()
    torch.testing.assert_close(model(x), expected)
    second.eject()
    assert type(model[0]) is nn.Linear and not torch.equal(model(x), expected)


@dataclass(frozen=True)
class Doubled(LoRA):
    """It adds twice the product, by a formula of its own."""

    key = "doubled"

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        return weight + 2 * scale * self.delta(t)


def test_a_method_with_another_formula_is_folded_by_that() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    before = model[0].weight.detach().clone()
    patch = adapters.inject(model, Doubled(rank=2), scale=0.5)
    torch.default_generator.manual_seed(1)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.normal_()
    down, up = patch.parameters()
    expected = before + up.detach() @ down.detach()
    patch.merge_and_eject()
    torch.testing.assert_close(model[0].weight.detach(), expected)
