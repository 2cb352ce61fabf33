"""A file of every writer's kind is recognised as one format, says what it should, and changes a model by just that."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import adapters
import weights
from tests.adapters.models import snapshot
from tests.weights.corpus import Case, corpus
from tests.weights.test_hostile_adapters import CASES as METHODS
from tests.weights.test_hostile_adapters import model_of, sound
from weights.formats import Probe, recognised, writable

CASES = corpus()


@pytest.mark.parametrize("name", CASES)
def test_it_is_of_one_format_and_says_what_it_should(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path = case.write(tmp_path)
    assert recognised(Probe(path)) == [case.format]
    file = weights.read_adapter(path)
    assert {where: (layer.method, scale(layer, case, where)) for where, layer in file.layers.items()} == case.layers
    assert file.components == case.components
    assert tuple(sorted(file.others)) == tuple(sorted(case.others))


def scale(layer: weights.LayerWeights, case: Case, where: str) -> float | None:
    """Alpha by rank, for the methods that have it."""
    numbers = layer.hyperparameters
    expected = case.layers.get(where, (None, None))[1]
    if expected is None:
        return None
    alpha, rank = numbers["alpha"], numbers["rank"]
    assert isinstance(alpha, float) and isinstance(rank, int)
    return alpha / rank


@pytest.mark.parametrize("name", CASES)
def test_weights_become_what_they_should(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    path, model = case.write(tmp_path), case.model()
    before, whole = {name: value.clone() for name, value in model.state_dict().items()}, snapshot(model)
    if case.others:
        with pytest.raises(adapters.LayerMismatchError, match=f"{case.others[0]}.* for no layer"):
            adapters.load(model, path)
        assert snapshot(model) == whole
    adapters.load(model, path, strict=not case.others).merge_and_eject()
    for name, value in model.state_dict().items():
        if name in case.changes:
            assert (value - before[name]).abs().max() > 1e-3
            torch.testing.assert_close(value, case.changes[name](before[name]), atol=1e-5, rtol=1e-5)
        else:
            assert torch.equal(value, before[name])


def refused(case: Case, tensors: dict[str, Tensor], match: str, folder: Path) -> None:
    """A file with these tensors too is not read."""
    path = replace(case, tensors={**case.tensors, **tensors}).write(folder)
    with pytest.raises(weights.FileFormatError, match=match):
        weights.read_adapter(path)


def test_what_is_no_change_of_a_weight_is_refused(tmp_path: Path) -> None:
    lora, upper = CASES["lycoris lora"], CASES["lycoris oft"]
    at = "lora_unet_down_0_to_q"
    refused(
        lora, {f"{at}.reshape_weight": torch.tensor([9, 9])}, "a reshape_weight: it makes the weight larger", tmp_path
    )
    refused(upper, {f"{at}.oft_R.weight": torch.ones(2, 4)}, r"an oft_R \(2, 4\), which is none of blocks", tmp_path)
    refused(upper, {f"{at}.oft_R.weight": torch.ones(2, 0)}, r"an oft_R \(2, 0\)", tmp_path)
    refused(upper, {f"{at}.dora_scale": torch.ones(8, 1)}, "dora_scale, oft_R.weight, which together", tmp_path)
    control = {f"lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.{end}": torch.ones(2, 2) for end in ENDS}
    for more in ({}, lora.tensors):
        refused(replace(lora, tensors=more), control, "it is a ControlNet-LLLite: it adds to what layers are", tmp_path)


ENDS = ("conditioning1.0.weight", "down.0.weight", "mid.0.weight", "up.0.weight")


@pytest.mark.parametrize("form", writable())
def test_tensors_for_no_layer_are_not_lost_in_silence(form: str, tmp_path: Path) -> None:
    file = weights.read_adapter(CASES["diffusers OneTrainer DIFFUSERS"].write(tmp_path))
    with pytest.raises(weights.FileFormatError, match=r"has a place for bundle_emb.*, which is for no layer: leave"):
        weights.write_adapter(file, tmp_path / "out.safetensors", form)
    assert not (tmp_path / "out.safetensors").exists()


def test_a_rotation_of_a_weight_is_only_known_in_the_model(tmp_path: Path) -> None:
    """Of a convolution it goes the other way than in PEFT's files."""
    case = CASES["comfyui oft of a convolution"]
    path, model = case.write(tmp_path), case.model()
    with pytest.raises(weights.FileFormatError, match="depends on whether it is a convolution: load it into the model"):
        weights.write_adapter(weights.read_adapter(path).part("unet"), tmp_path / "out", "peft")
    weights.write_adapter(weights.read_adapter(path), tmp_path / "out", "fluxion")
    merged = []
    for source in (path, tmp_path / "out", tmp_path / "saved"):
        patch = adapters.load(model.get_submodule("unet"), source, component=None if source.is_dir() else "unet")
        if source == path:
            patch.save_pretrained(tmp_path / "saved", format="peft")
        patch.merge()
        merged.append(model.state_dict()["unet.a.b.weight"].clone())
        patch.eject()
    assert torch.equal(merged[0], merged[1]) and torch.equal(merged[0], merged[2])


@pytest.mark.parametrize(("form", "key"), METHODS)
def test_every_method_is_of_one_format_and_written_as_it_was_read(form: str, key: str, tmp_path: Path) -> None:
    name, tensors, config, metadata = sound(form, key)
    case = Case(form, tensors, {}, {}, {}, file=name, metadata=metadata, config=config or None)
    path = case.write(tmp_path)
    assert recognised(Probe(path)) == [form]
    out = tmp_path / "out" / name
    out.parent.mkdir()
    model = model_of(key)
    adapters.load(model, path).save_pretrained(out.parent if form == "peft" else out, format=form)
    written = weights.open(out)
    assert written.keys() == tensors.keys()
    # The alpha of two whole Kronecker factors is of no account.
    same = {at for at in tensors if not (key in ("lokr", "dokr") and at.endswith(".alpha"))}
    assert all(torch.equal(tensors[at], written[at]) for at in same)
    assert not config or json.loads((out.parent / "adapter_config.json").read_text()) == config
