"""The patches that are known of each model: a change in one is seen in all that have a part of it, and in no other."""

from __future__ import annotations

import pytest
from torch import nn

import adapters
from adapters import LoRA, Patch
from adapters.patch import registry

LORA = LoRA(rank=1)


def blocks() -> nn.Sequential:
    return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)) for _ in range(2)))


@pytest.fixture
def looked_through(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that are looked through for patches, in the order in which that happens."""
    models: list[nn.Module] = []
    modules = registry.base_modules

    def noted(model: nn.Module) -> object:
        models.append(model)
        return modules(model)

    monkeypatch.setattr(registry, "base_modules", noted)
    return models


def test_what_is_known_of_other_models_stays(looked_through: list[nn.Module]) -> None:
    one, other = blocks(), blocks()
    patch = adapters.inject(one, LORA, name="one")
    adapters.inject(other, LORA, name="other")
    adapters.patches(one)
    looked_through.clear()
    for model in (one, other, one):
        patch.eject()
        patch.inject()
        adapters.inject(model, LORA, name="more").eject()
        assert list(adapters.patches(other)) == ["other"]
        assert list(adapters.patches(one)) == ["one"]
    assert looked_through == []


def test_a_part_and_the_whole_see_each_others_patches() -> None:
    model = blocks()
    part, neighbour = model[0], model[1]

    def seen() -> list[list[str]]:
        return [[*adapters.patches(each)] for each in (model, part, neighbour)]

    assert seen() == [[], [], []]
    inner = adapters.inject(part, LORA, name="inner")
    assert seen() == [["inner"], ["inner"], []]
    outer = adapters.inject(model, LORA, name="outer")
    assert seen() == [["inner", "outer"], ["inner", "outer"], ["outer"]]
    inner.eject()
    assert seen() == [["outer"], ["outer"], ["outer"]]
    outer.eject()
    assert seen() == [[], [], []]


def test_pipelines_that_share_a_component_see_its_patches() -> None:
    unet, text_encoder, vae = blocks(), blocks(), blocks()
    first, second = {"unet": unet, "text_encoder": text_encoder}, {"vae": vae, "text_encoder": text_encoder}
    keep = [adapters.inject(models, LORA, name=name) for models, name in ((first, "first"), (second, "second"))]
    assert list(adapters.patches(vae)) == ["second"]
    adapters.inject(text_encoder, LORA, name="text")
    for models in (first, second):
        assert list(adapters.patches(models)) == ["first", "second", "text"]
    assert list(adapters.patches(unet)) == ["first"]
    assert list(adapters.patches(vae)) == ["second"]
    assert all(isinstance(patch, Patch) for patch in keep)


def test_layers_added_since_are_seen() -> None:
    """In a part that was looked through before, and below it."""
    model = blocks()
    assert adapters.patches(model) == adapters.patches(model[0]) == {}
    model[0].append(nn.Sequential(nn.Linear(4, 4)))
    patch = adapters.inject(model, LORA, targets="0.2.0", name="new")
    assert adapters.patches(model[0]) == {"new": patch}
    patch.eject()
    assert adapters.patches(model[0]) == {}


def test_a_model_that_is_put_into_a_known_one_is_seen() -> None:
    model, tower = blocks(), blocks()
    assert adapters.patches(model) == {}
    model.append(tower)
    patch = adapters.inject(tower, LORA, name="tower")
    assert adapters.patches(model) == {"tower": patch}


def test_a_failed_injection_leaves_what_was_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model = blocks()
    first = adapters.inject(model, LORA, name="first")

    def failing(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("adapters.patch.surgery.freeze_base", failing)
    with pytest.raises(KeyboardInterrupt):
        adapters.inject(model, LORA, name="second")
    assert adapters.patches(model) == adapters.patches(model[0]) | {} == {"first": first}
