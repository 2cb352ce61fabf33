"""Where PEFT's scaling methods do other than they say; and files in which the layers differ."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import adapters
from adapters import IA3, HiRA, Patch
from tests.adapters.models import perturb
from weights import FileFormatError


def theirs(model: nn.Module, config: peft.PeftConfig) -> peft.PeftModel:
    with warnings.catch_warnings(action="ignore"):
        found = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return found


def factors(patch: Patch) -> tuple[Tensor, Tensor]:
    a, b = (tensor.flatten(1) for _, tensor in sorted(patch.state_dict().items()))
    return a, b


def test_hira_on_a_circular_convolution(tmp_path: Path) -> None:
    """PEFT pads the input of its update with zeros, whatever the layer does: merged it computes something else."""
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")).double(), torch.randn(2, 4, 7, 7)
    x = x.double()
    other = theirs(model, peft.HiraConfig(target_modules=["0"], r=2)).double()
    with torch.no_grad():
        unmerged = other(x)
        other.merge_adapter()
        assert not torch.allclose(other(x), unmerged, atol=0.01)
        other.unmerge_adapter()
        other.save_pretrained(tmp_path)
        patch = adapters.load(model, tmp_path)
        a, b = factors(patch)
        weight = model[0].base.weight
        changed = weight + weight * (b @ a).view_as(weight)
        expected = F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), changed, model[0].base.bias)
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)
        patch.merge()
        torch.testing.assert_close(model(x), expected, rtol=1e-10, atol=1e-10)


def test_hira_on_an_embedding_that_shortens(tmp_path: Path) -> None:
    """PEFT adds its update after `max_norm` has shortened the rows, but merged it is shortened with them."""
    model, x = nn.Sequential(nn.Embedding(7, 4, max_norm=1.0)).double(), torch.randint(0, 7, (3, 4))
    model(x)  # Torch shortens the rows as it reads them.
    other = theirs(model, peft.HiraConfig(target_modules=["0"], r=2)).double()
    with torch.no_grad():
        unmerged = other(x)
        other.merge_adapter()
        assert not torch.allclose(other(x), unmerged, atol=0.01)
        other.unmerge_adapter()
        other.save_pretrained(tmp_path)
        patch = adapters.load(model, tmp_path)
        a, b = factors(patch)
        weight = model[0].base.weight
        rows = F.embedding(x, weight + weight * (b @ a).T)
        expected = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1)
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)
        patch.merge()
        torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-6)


def test_hira_and_its_rank_pattern(tmp_path: Path) -> None:
    """PEFT heeds `rank_pattern` for a layer's second adapter only, and cannot load what it wrote of that one."""
    model = nn.Sequential(nn.Linear(6, 8))
    config = peft.HiraConfig(target_modules=["0"], r=3, rank_pattern={"0": 5})
    other = theirs(model, config)
    other.add_adapter("second", copy.copy(config))
    ranks = {name: len(factor) for name, factor in other.base_model.model[0].hira_A.items()}
    assert ranks == {"default": 3, "second": 5}
    other.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="copying a param with shape"):
        peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "second")
    for path, rank in ((tmp_path, 3), (tmp_path / "second", 5)):
        patch = adapters.load(model, path, name="loaded")
        assert {place.branch.method for place in patch.attachments} == {HiRA(rank)}
        patch.eject()
    # So layers of several ranks make no file that PEFT could read.
    mixed = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    patch = adapters.inject(mixed, {"0": HiRA(2), "1": HiRA(3)})
    with pytest.raises(FileFormatError, match="its layers differ in rank, PEFT keeps one"):
        patch.save_pretrained(tmp_path / "mixed", format="peft")


class Nested(nn.Module):
    """Layers of which one's path is the end of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(6, 6)
        self.block = nn.ModuleDict({"out": nn.Linear(6, 6), "up": nn.Linear(6, 6)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block["up"](self.block["out"](self.out(x)).tanh())


@pytest.mark.parametrize("inputs", [(), ("out",), ("block.out",), ("out", "block.up"), ("out", "block.out")])
def test_ia3_of_inputs_and_outputs_in_one_file(inputs: tuple[str, ...], tmp_path: Path) -> None:
    model, x = Nested().double(), torch.randn(4, 6).double()
    base = copy.deepcopy(model)
    paths = ("out", "block.out", "block.up")
    patch = adapters.inject(
        model,
        {(lambda path, module, own=path: path == own): IA3(path in inputs) for path in paths},
    )
    perturb(patch, std=1.0)
    expected = model(x)
    patch.save_pretrained(tmp_path)
    again = adapters.load(copy.deepcopy(base), tmp_path)
    assert {place.path for place in again.attachments if place.branch.method == IA3(True)} == set(inputs)
    other = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).double()
    torch.testing.assert_close(other(x), expected, rtol=1e-10, atol=1e-10)


def test_feedforward_modules_that_are_no_names(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    adapters.inject(model, IA3()).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    text = config.read_text()
    assert '"feedforward_modules": []' in text
    for wrong in ("[1]", "7", '"("'):
        config.write_text(text.replace('"feedforward_modules": []', f'"feedforward_modules": {wrong}'))
        with pytest.raises(FileFormatError, match=r"feedforward_modules=.* is not of the right kind"):
            adapters.load(model, tmp_path, name="loaded")
