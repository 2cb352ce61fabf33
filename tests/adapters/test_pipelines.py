"""Patches in several models at once: a pipeline of diffusers, a dict of modules."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapters
import weights
from adapters import AdapterError, LoRA, PatchStateError, TargetError
from adapters.targets.models import as_module
from tests.adapters.models import perturb, snapshot
from tests.adapters.pipeline import Pipeline, pipeline


def table() -> dict[str, nn.Module]:
    torch.default_generator.manual_seed(0)
    return {"unet": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "text_encoder": nn.Sequential(nn.Linear(4, 4))}


X = torch.arange(8.0).reshape(2, 4)


def outputs(models: dict[str, nn.Module]) -> dict[str, Tensor]:
    with torch.no_grad():
        return {name: model(X) for name, model in models.items()}


def test_one_patch_in_all_models_of_a_table() -> None:
    models = table()
    before, plain = {name: snapshot(model) for name, model in models.items()}, outputs(models)
    patch = adapters.inject(models, LoRA(rank=2), name="style")
    perturb(patch)
    assert list(patch.targets) == ["unet.0", "unet.1", "text_encoder.0"]
    changed = outputs(models)
    assert not any(torch.equal(changed[name], plain[name]) for name in models)
    assert adapters.patches(models) == adapters.patches(dict(models)) == {"style": patch}
    assert all(adapters.patches(model) == {"style": patch} for model in models.values())
    with adapters.use(models):
        assert all(torch.equal(out, plain[name]) for name, out in outputs(models).items())
    with adapters.use(models["unet"], {"style": 0.5}):
        assert not torch.equal(outputs(models)["text_encoder"], changed["text_encoder"])
    patch.merge()
    torch.testing.assert_close(outputs(models), changed)
    patch.eject()
    assert {name: snapshot(model) for name, model in models.items()} == before
    assert adapters.patches(models) == {}
    patch.inject()
    assert all(torch.equal(out, changed[name]) for name, out in outputs(models).items())


def test_patterns_have_the_name_of_the_model_in_front() -> None:
    models = table()
    assert list(adapters.inject(models, LoRA(rank=1), targets="unet.*").targets) == ["unet.0", "unet.1"]
    assert list(adapters.inject(models, LoRA(rank=1), targets="0", name="b").targets) == ["unet.0", "text_encoder.0"]


@pytest.mark.parametrize("format", ["fluxion", "lycoris", "diffusers"])
def test_a_file_puts_each_part_where_it_belongs(tmp_path: Path, format: str) -> None:
    models = table()
    patch = adapters.inject(models, LoRA(rank=2, alpha=3), name="style")
    perturb(patch)
    changed = outputs(models)
    path = patch.save_pretrained(tmp_path / "style.safetensors", format=format)
    patch.eject()
    file = weights.read_adapter(path)
    assert sorted(file.components) == ["text_encoder", "unet"]
    again = adapters.load(models, path)
    assert all(torch.equal(out, changed[name]) for name, out in outputs(models).items())
    again.eject()
    part = adapters.load(models["unet"], path, component="unet")
    assert list(part.targets) == ["0", "1"]
    assert torch.equal(outputs(models)["unet"], changed["unet"])
    with pytest.raises(adapters.LayerMismatchError, match="or for several: choose one with component="):
        adapters.load(models["text_encoder"], path)


def test_peft_holds_one_model(tmp_path: Path) -> None:
    models = table()
    patch = adapters.inject(models, LoRA(rank=2))
    with pytest.raises(weights.FileFormatError, match=r"for several models \(text_encoder, unet\)"):
        patch.save_pretrained(tmp_path, format="peft")
    assert list(tmp_path.iterdir()) == []
    assert list(adapters.load(models, patch.save_pretrained(tmp_path), name="again").targets) == list(patch.targets)
    alone = adapters.inject(models["unet"], LoRA(rank=2), name="alone")
    file = weights.read_adapter(alone.save_pretrained(tmp_path / "alone", component="unet"))
    assert list(file.layers) == ["0", "1"]
    with pytest.raises(AdapterError, match="'unet' is for one model"):
        patch.save_pretrained(tmp_path, component="unet")


@pytest.mark.parametrize("models", [{}, {"a": 1}, {"a": nn.Linear(2, 2), "b": None}, 3, "gpt2", None])
def test_what_is_no_model_is_refused(models: object) -> None:
    for call in (adapters.patches, lambda m: adapters.inject(m, LoRA()), lambda m: adapters.load(m, "x")):
        with pytest.raises(AdapterError, match="is no model"):
            call(models)  # type: ignore[operator]


def test_a_model_that_is_one_layer_has_no_place_for_an_adapter() -> None:
    """Nothing would look in the table for it."""
    with pytest.raises(TargetError, match="has no layers below it"):
        adapters.inject({"fc": nn.Linear(4, 4)}, LoRA(rank=1))


def test_nothing_is_kept_alive() -> None:
    models = table()
    together = weakref.ref(as_module(models))
    gc.collect()
    assert together() is None
    patch = adapters.inject(models, LoRA(rank=1))
    together = weakref.ref(as_module(models))
    gc.collect()
    assert as_module(models) is together() is patch.model
    first = weakref.ref(models["unet"])
    patch.eject()
    del patch, models
    gc.collect()
    assert together() is first() is None


def test_asking_for_patches_keeps_nothing_alive() -> None:
    models = table()
    adapters.inject(models, LoRA(rank=1))
    assert list(adapters.patches(models)) == ["default"]
    first = weakref.ref(models["unet"])
    del models
    gc.collect()
    assert first() is None


@pytest.mark.parametrize("together_first", [True, False])
def test_each_model_is_frozen_while_a_patch_of_its_own_wants_it(together_first: bool) -> None:
    models = {**table(), "vae": nn.Sequential(nn.Linear(4, 4))}
    parts = [(name, models[name]) for name in ("unet", "text_encoder")]
    weight = {name: model[0].weight for name, model in models.items()}
    if together_first:
        together = adapters.inject(models, LoRA(rank=1))
    alone = {name: adapters.inject(model, LoRA(rank=1), name=name) for name, model in parts}
    if not together_first:
        together = adapters.inject(models, LoRA(rank=1))
    assert not any(parameter.requires_grad for parameter in weight.values())
    together.eject()
    assert [name for name, parameter in weight.items() if parameter.requires_grad] == ["vae"]
    alone["unet"].eject()
    assert [name for name, parameter in weight.items() if parameter.requires_grad] == ["unet", "vae"]
    alone["text_encoder"].eject()
    assert all(parameter.requires_grad for parameter in weight.values())


def test_a_patch_copied_with_one_of_its_models_is_in_that() -> None:
    models = table()
    perturb(adapters.inject(models, LoRA(rank=2), name="style"))
    for copied in (copy.deepcopy(models["unet"]), pickle.loads(pickle.dumps(models["unet"]))):
        patch, changed = adapters.patches(copied)["style"], copied(X)
        assert list(patch.targets) == ["0", "1"] == list(patch.adapter_file().layers)
        assert patch.model is copied
        file = patch.adapter_file()
        patch.eject()
        adapters.load(copied, file)
        assert torch.equal(copied(X), changed)


def test_a_patch_copied_with_all_of_its_models_is_in_all() -> None:
    """Asked for with one of them, it is not taken for one of that alone."""
    models = table()
    perturb(adapters.inject(models, LoRA(rank=2), name="style"))
    copied = copy.deepcopy(models)
    patch = adapters.patches(copied["unet"])["style"]
    patch.merge()
    changed = outputs(copied)
    for call in (patch.eject, patch.merge_and_eject, patch.adapter_file):
        with pytest.raises(PatchStateError, match="with the pipeline or the dict"):
            call()
    assert patch.merged
    assert all(torch.equal(out, changed[name]) for name, out in outputs(copied).items())
    assert adapters.patches(copied) == {"style": patch}
    assert list(patch.adapter_file().layers) == ["unet.0", "unet.1", "text_encoder.0"]
    patch.eject()
    assert not any(isinstance(module, adapters.AdaptedLayer) for model in copied.values() for module in model.modules())


def test_a_pipeline_of_diffusers(tmp_path: Path) -> None:
    case: Pipeline = pipeline()
    plain = case()
    parts = {name: getattr(case.pipe, name) for name in ("unet", "text_encoder", "vae")}
    before = {name: snapshot(part) for name, part in parts.items()}
    patch = adapters.inject(case.pipe, LoRA(rank=2), targets=["unet.**.to_q", "text_encoder.**.q_proj"], name="style")
    perturb(patch)
    changed = case()
    assert not any(torch.equal(a, b) for a, b in zip(changed, plain, strict=True))
    with adapters.use(case.pipe):
        assert all(map(torch.equal, case(), plain))
    path = patch.save_pretrained(tmp_path, format="diffusers")
    patch.eject()
    assert {name: snapshot(part) for name, part in parts.items()} == before
    adapters.load(case.pipe, path)
    assert all(map(torch.equal, case(), changed))
