"""Checkpoints of patched models: base keys stay, so that they and those of bare models load into each other."""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as distributed
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as distributed_state

import adapters
from adapters import LoRA, Patch
from tests.adapters.models import Case, perturb, snapshot
from tests.adapters.pretrained import build
from tests.fluxion.test_scaling import count_calls

LORA = LoRA(rank=2, alpha=4)

# Heads that are tied, embeddings that are tied, transposed weights, convolutions, stacked experts.
NAMES = ["bert", "gpt2", "t5", "whisper", "mixtral", "unet"]


def patched(name: str, seed: int = 0) -> tuple[Case, Patch]:
    case = build(name, seed)
    patch = adapters.inject(case.model, LORA)
    perturb(patch, seed, std=0.1)
    return case, patch


def run(case: Case, model: nn.Module) -> Tensor:
    """What another model computes of the inputs of a case."""
    return Case(case.name, model, case.inputs, case.run)()


def reload(case: Case, path: Path) -> tuple[Any, dict[str, Any]]:
    """A bare model from a folder, and what its library says of the loading."""
    if isinstance(case.model, UNet2DConditionModel):
        model, said = UNet2DConditionModel.from_pretrained(path, output_loading_info=True)
    else:
        model, said = type(case.model).from_pretrained(
            path, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
        )
    return model.eval(), said


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_patched_model_is_a_checkpoint_of_the_base(name: str, tmp_path: Path) -> None:
    case, patch = patched(name)
    before, adapted = snapshot(case.model), case()
    case.model.save_pretrained(tmp_path)
    assert snapshot(case.model) == before
    assert torch.equal(case(), adapted)
    bare, said = reload(case, tmp_path)
    assert not said["missing_keys"]
    assert not said["mismatched_keys"]
    assert all(".lora_default" in key for key in said["unexpected_keys"])
    patch.eject()
    assert torch.equal(run(case, bare), case())
    assert list(bare.state_dict()) == list(case.model.state_dict())


@pytest.mark.parametrize("name", NAMES)
def test_a_patched_model_saves_what_the_bare_one_saves(name: str, tmp_path: Path) -> None:
    """And no key is lost that only the layer of a shared tensor had."""
    case, patch = patched(name)
    case.model.save_pretrained(tmp_path / "patched")
    patch.eject()
    case.model.save_pretrained(tmp_path / "bare")
    with_adapters, without = ({}, {})
    for found, folder in ((with_adapters, "patched"), (without, "bare")):
        for file in (tmp_path / folder).glob("*.safetensors"):
            found.update(load_file(file))
    assert {key for key in with_adapters if ".lora_default" not in key} == without.keys()
    assert all(torch.equal(with_adapters[key], value) for key, value in without.items())


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_an_adapter_folded_in_is_saved_and_loaded_as_any(name: str, tmp_path: Path) -> None:
    """Also where folding in has given tied layers weights of their own."""
    case, patch = patched(name)
    adapted = case()
    patch.merge_and_eject()
    folded = case()
    torch.testing.assert_close(folded, adapted, rtol=1e-4, atol=1e-5 * adapted.abs().max().item())
    case.model.save_pretrained(tmp_path)
    again, said = reload(case, tmp_path)
    assert not said["missing_keys"]
    assert not said["unexpected_keys"]
    assert torch.equal(run(case, again), folded)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "unet"])  # Of which there are thousands of files.
def test_distributed_checkpoints(name: str, tmp_path: Path) -> None:
    case, patch = patched(name)
    adapted = case()
    with adapters.use(case.model):
        base = case()
    state = distributed_state.get_model_state_dict(case.model)
    assert list(state) == list(case.model.state_dict())
    distributed.save(state, checkpoint_id=tmp_path / "patched", no_dist=True)

    # Into a bare model: its own keys are all there.
    bare = build(name, seed=9).model
    wanted = distributed_state.get_model_state_dict(bare)
    distributed.load(wanted, checkpoint_id=tmp_path / "patched", no_dist=True)
    distributed_state.set_model_state_dict(bare, wanted)
    assert torch.equal(run(case, bare), base)
    distributed.save(wanted, checkpoint_id=tmp_path / "bare", no_dist=True)

    # From there into another patched model: its base becomes the saved one, its adapters stay.
    other, second = patched(name, seed=5)
    second.load_state_dict(patch.state_dict())
    assert not torch.equal(run(case, other.model), adapted)
    wanted = {key: distributed_state.get_model_state_dict(other.model)[key] for key in wanted}
    distributed.load(wanted, checkpoint_id=tmp_path / "bare", no_dist=True)
    distributed_state.set_model_state_dict(other.model, wanted)
    assert torch.equal(run(case, other.model), adapted)

    # And all of it, adapters included.
    other, _ = patched(name, seed=7)
    wanted = distributed_state.get_model_state_dict(other.model)
    distributed.load(wanted, checkpoint_id=tmp_path / "patched", no_dist=True)
    distributed_state.set_model_state_dict(other.model, wanted)
    assert torch.equal(run(case, other.model), adapted)


def test_distributed_checkpoints_of_a_training(tmp_path: Path) -> None:
    """Optimizer states are found by the names of parameters, those of adapters included."""
    case, patch = patched("bert")

    def trained(case: Case, patch: Patch, optimizer: torch.optim.Optimizer, steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            case.run(case.model, case.inputs).square().mean().backward()
            optimizer.step()

    optimizer = torch.optim.AdamW(patch.parameters(), lr=0.01)
    trained(case, patch, optimizer, 2)
    model_state, optimizer_state = distributed_state.get_state_dict(case.model, optimizer)
    assert set(optimizer_state["state"]) == {
        name for name, parameter in case.model.named_parameters() if parameter.requires_grad
    }
    distributed.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path, no_dist=True)
    trained(case, patch, optimizer, 2)

    again, second = patched("bert", seed=3)
    optimizer = torch.optim.AdamW(second.parameters(), lr=0.01)
    model_state, optimizer_state = distributed_state.get_state_dict(again.model, optimizer)
    distributed.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=tmp_path, no_dist=True)
    distributed_state.set_state_dict(
        again.model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state
    )
    again.inputs = case.inputs
    trained(again, second, optimizer, 2)
    for (name, one), (other, two) in zip(patch.named_parameters(), second.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(one, two), name


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_model_is_saved_and_loaded(name: str) -> None:
    case, patch = patched(name)
    adapted = case()
    file = io.BytesIO()
    torch.save(case.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    patch.enabled = False
    assert torch.equal(run(case, again), adapted)
    twin = adapters.patches(again)["default"]
    assert twin is not patch
    twin.merge()
    twin.eject()
    assert torch.equal(run(case, again), case())


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_stands_alone(name: str) -> None:
    case, patch = patched(name)
    before, adapted = snapshot(case.model), case()
    for merged in (False, True):
        clone = copy.deepcopy(case.model)
        if merged:
            patch.unmerge()
        twin = adapters.patches(clone)["default"]
        assert twin.merged == merged
        assert not {p.data_ptr() for p in clone.parameters()} & {p.data_ptr() for p in case.model.parameters()}
        with torch.no_grad():
            for parameter in clone.parameters():
                parameter.mul_(3)
        twin.eject()
        assert not any(isinstance(module, adapters.AdaptedLayer) for module in clone.modules())
        assert torch.equal(case(), adapted)
        assert snapshot(case.model) == before
        if not merged:
            patch.merge()


def test_the_patches_of_a_copy_are_found_in_linear_time() -> None:
    def count(size: int) -> int:
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(size)))
        adapters.inject(model, LORA)
        clone = copy.deepcopy(model)
        return count_calls(lambda: adapters.patches(clone))

    assert count(100) < 2.5 * count(50)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("merged", [False, True])
def test_functional_call_takes_base_keys(name: str, merged: bool) -> None:
    """Given other weights, a patched model adds its adapters to them; a merged weight is replaced by what is given."""
    case, patch = patched(name)
    adapted = case()
    if merged:
        patch.merge()
    before = snapshot(case.model)
    names = [key for key, _ in case.model.named_parameters() if ".lora_default" not in key]
    assert any(key.endswith(".bias") for key in names) or name in ("t5", "mixtral")
    other = {key: value + 0.05 * torch.randn_like(value) for key, value in case.model.named_parameters()}
    given = {key: other[key].detach() for key in names}
    assert set(given) < set(other)
    output = run(case, _Functional(case.model, given))
    assert snapshot(case.model) == before
    assert not torch.allclose(output, adapted, rtol=1e-3)

    reference, twin = patched(name)
    if merged:
        twin.merge_and_eject()
    with torch.no_grad():
        for key, value in reference.model.named_parameters():
            value.copy_(given.get(key, value))
    torch.testing.assert_close(output, run(case, reference.model), rtol=1e-4, atol=1e-5)


def test_weights_are_set_through_the_node() -> None:
    """As models do that tie their weights."""
    case, patch = patched("bert")
    path = "bert.encoder.layer.0.attention.self.query"
    node, layer = case.model.get_submodule(path), patch.targets[path]
    assert isinstance(node, adapters.AdaptedLayer)
    weight, bias = nn.Parameter(torch.randn(16, 16)), nn.Parameter(torch.randn(16))
    node.weight, node.bias = weight, bias
    assert layer.weight is weight
    assert layer.bias is bias
    with pytest.raises(TypeError, match="cannot assign"):
        node.bias = torch.zeros(16)
    patch.eject()
    assert case.model.get_submodule(path) is layer
    assert layer.weight is weight


class _Functional(nn.Module):
    def __init__(self, model: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.replaced = model, dict(parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.model, self.replaced, args, kwargs)
