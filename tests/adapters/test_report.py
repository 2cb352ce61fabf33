"""A report says of adapters what linear algebra on full matrices, other files and loading itself say."""

from __future__ import annotations

import builtins
import math
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
import weights
from adapters import AdapterError, LoRA, Report
from adapters.reports.report import Layer
from tests.adapters.test_methods import perturb


class Model(nn.Module):
    """Layers of several kinds and shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)}) for _ in range(2))
        self.conv = nn.Conv2d(4, 6, 3)
        self.norm = nn.LayerNorm(8)


def made(path: Path, method: Any, targets: Any = None, seed: int = 0) -> Path:
    """An adapter that does something."""
    model = Model()
    patch = adapters.inject(model, method, targets, seed=seed)
    perturb(patch, seed)
    return patch.save_pretrained(path, format="fluxion")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.default_generator.manual_seed(1)
    return weights.save(Model().state_dict(), tmp_path / "base.safetensors")


def updates(base: Path, adapter: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """By path, the weight of the base and what merging adds to it, both as matrices."""
    model = Model()
    model.load_state_dict(dict(weights.open(base)))
    patch = adapters.load(model, adapter)
    patch.merge()
    found = {}
    after = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for path in patch.targets:
        name = path if path in after else f"{path}.weight"
        weight, merged = weights.open(base)[name], after[name]
        pair = [one.double().flatten(1) if one.ndim > 1 else one.double() for one in (weight, merged - weight)]
        found[path] = (pair[0].T, pair[1].T) if path == "embed" else (pair[0], pair[1])
    return found


METHODS = {
    "lora": LoRA(rank=3, alpha=5),
    "dora": adapters.DoRA(rank=2),
    "loha": adapters.LoHa(rank=2),
    "lokr": adapters.LoKr(rank=2, factor=2),
    "ia3": adapters.IA3(),
    "oft": adapters.OFT(block_size=2),
    "vera": adapters.VeRA(rank=4),
    "norm": adapters.NormTuning(),
    "full": adapters.Full(),
}


@pytest.mark.parametrize("name", METHODS)
def test_measures_are_those_of_what_merging_adds(name: str, base: Path, tmp_path: Path) -> None:
    adapter = made(tmp_path / "adapter.safetensors", METHODS[name])
    (found,) = adapters.report(adapter, base).adapters
    expected = updates(base, adapter)
    assert {layer.path for layer in found.layers} == expected.keys()
    assert found.fit is not None
    assert (set(found.fit.loads), found.fit.refused, found.fit.unchecked) == (expected.keys(), (), ())
    for layer in found.layers:
        weight, update = expected[layer.path]
        assert layer.norm == pytest.approx(float(update.norm()), rel=1e-4)
        relative = float(update.norm()) / float(weight.norm()) if weight.any() else None
        assert layer.relative == (relative and pytest.approx(relative, rel=1e-4))
        if update.ndim == 2:
            check_spectrum(layer, update)


def check_spectrum(layer: Layer, update: Tensor) -> None:
    singular = torch.linalg.svdvals(update)
    values = torch.zeros_like(singular)
    values[: len(layer.singular_values)] = torch.tensor(layer.singular_values)
    torch.testing.assert_close(values, singular, rtol=1e-3, atol=1e-5 * float(singular[0]))
    share = singular[singular > 1e-5 * singular[0]] / singular.sum()
    assert layer.effective_rank == pytest.approx(math.exp(-float((share * share.log()).sum())), rel=1e-3)
    assert layer.stable_rank == pytest.approx(float((singular**2).sum() / singular[0] ** 2), rel=1e-3)


@pytest.mark.parametrize("name", ["lora", "loha", "lokr"])
def test_without_a_base_files_tell_the_shapes(name: str, base: Path, tmp_path: Path) -> None:
    adapter = made(tmp_path / "adapter.safetensors", METHODS[name])
    alone, beside = adapters.report(adapter), adapters.report(adapter, base)
    assert alone.adapters[0].fit is None
    for one, other in zip(alone.adapters[0].layers, beside.adapters[0].layers, strict=True):
        assert (one.path, one.relative, one.note) == (other.path, None, "")
        assert one.norm == pytest.approx(other.norm, rel=1e-6)
        assert one.singular_values == pytest.approx(other.singular_values, rel=1e-4)


def test_without_a_base_what_depends_on_it_is_said(tmp_path: Path) -> None:
    (found,) = adapters.report(made(tmp_path / "adapter.safetensors", METHODS["dora"])).adapters
    assert {layer.note for layer in found.layers} == {"its update is known only with the base model"}
    assert [layer.norm for layer in found.layers] == [None] * len(found.layers)
    assert found.parameters == sum(layer.parameters for layer in found.layers) > 0


def test_large_full_matrices_by_their_leading_part(tmp_path: Path) -> None:
    """Of these, the first singular values and the stable rank are right, and the effective rank is not claimed."""
    torch.default_generator.manual_seed(0)
    left, right = torch.linalg.qr(torch.randn(1100, 40)).Q, torch.linalg.qr(torch.randn(1200, 40)).Q
    values = 0.8 ** torch.arange(40.0)
    weight = torch.randn(1100, 1200)
    weights.save({"a.weight": weight}, tmp_path / "base.safetensors")
    tensors = {"weight": weight + left @ torch.diag(values) @ right.T}
    file = weights.AdapterFile({"a": weights.LayerWeights("copy", {}, tensors)})
    state = torch.random.get_rng_state()
    (layer,) = adapters.report(file, tmp_path / "base.safetensors").adapters[0].layers
    assert torch.equal(torch.random.get_rng_state(), state)
    assert len(layer.singular_values) <= 64
    assert layer.singular_values[:10] == pytest.approx(values[:10].tolist(), rel=1e-2)
    assert layer.norm == pytest.approx(float(values.norm()), rel=1e-2)
    assert layer.effective_rank is None
    assert layer.stable_rank == pytest.approx(float(values.square().sum()), rel=2e-2)


def test_overlap_is_that_of_full_matrices(base: Path, tmp_path: Path) -> None:
    one, two = made(tmp_path / "one", LoRA(rank=3), seed=1), made(tmp_path / "two", adapters.LoHa(rank=2), seed=2)
    (overlap,) = adapters.report([one, two], base).overlaps
    a, b = updates(base, one), updates(base, two)
    assert (overlap.a, overlap.b) == ("one", "two")
    both = a.keys() & b.keys()
    assert {layer.path for layer in overlap.layers} == both
    for layer in overlap.layers:
        first, second = a[layer.path][1], b[layer.path][1]
        cosine = (first * second).sum() / first.norm() / second.norm()
        assert layer.cosine == pytest.approx(float(cosine), abs=1e-4)
        k = min(3, int(torch.linalg.matrix_rank(second, rtol=1e-5)))
        left, right = (torch.linalg.svd(update)[0][:, :k] for update in (first, second))
        assert layer.subspace == pytest.approx(float((left.T @ right).square().sum()) / k, abs=1e-3)
        assert layer.chance == k / len(first)
    product = sum(float((a[path][1] * b[path][1]).sum()) for path in both)
    sizes = [math.sqrt(sum(float(update.norm()) ** 2 for _, update in some.values())) for some in (a, b)]
    assert overlap.cosine == pytest.approx(product / sizes[0] / sizes[1], abs=1e-4)


def test_the_same_adapter_in_another_format(base: Path, tmp_path: Path) -> None:
    """Names without dots, and with the name of the model in front, mean the same layers."""
    one = made(tmp_path / "one.safetensors", LoRA(rank=2), ["up", "down"])
    file = weights.read_adapter(one)
    inside = replace(file, components=("unet",), layers={f"unet.{path}": layer for path, layer in file.layers.items()})
    other = weights.write_adapter(inside, tmp_path / "kohya.safetensors", "lycoris")
    for at in (None, base):
        (overlap,) = adapters.report([one, other], at).overlaps
        assert overlap.cosine == pytest.approx(1)
        assert [layer.path for layer in overlap.layers] == [*sorted(file.layers)]
        assert [layer.subspace for layer in overlap.layers] == pytest.approx([1] * 4)


# What would load


def test_what_would_not_load_is_what_loading_refuses(base: Path, tmp_path: Path) -> None:
    file = weights.read_adapter(made(tmp_path / "adapter.safetensors", LoRA(rank=2), ["up", "down"]))
    narrow = file.layers["blocks.0.up"]
    layers = {**file.layers, "blocks.0.down": narrow, "blocks.7.up": narrow}
    wrong = replace(file, layers=layers, others={"token": torch.zeros(3)})
    fit = adapters.report(wrong, base).adapters[0].fit
    assert fit is not None
    assert sorted(fit.loads) == ["blocks.0.up", "blocks.1.down", "blocks.1.up"]
    absent, different, others = fit.refused
    assert absent == "there is no layer blocks.7.up"
    assert different == (
        "blocks.0.down: lora_A is (2, 8) in the file, (2, 12) in the model; lora_B is (12, 2) in the file, (8, 2) in"
        " the model"
    )
    assert others == "token is for no layer"
    with pytest.raises(adapters.LayerMismatchError) as refused:
        adapters.load(Model(), replace(wrong, others={}))
    assert all(part in str(refused.value) for part in (absent, *different.split("; ")))


def test_what_only_the_model_shows(base: Path) -> None:
    prompt = weights.LayerWeights("prompt_tuning", {}, {"prompt_embeddings": torch.zeros(4, 8)})
    fit = adapters.report(weights.AdapterFile({"": prompt}), base).adapters[0].fit
    assert fit is not None
    assert (fit.loads, fit.refused, fit.unchecked) == ((), (), ("",))


def test_an_unknown_method_is_no_reason_to_fail(base: Path) -> None:
    file = weights.AdapterFile({"blocks.0.up": weights.LayerWeights("magic", {}, {"x": torch.zeros(3)})})
    (found,) = adapters.report(file, base).adapters
    assert found.fit is not None
    assert "'magic' is not known" in found.fit.refused[0]
    assert "'magic' is not known" in found.layers[0].note
    assert adapters.report(file).adapters[0].layers[0].norm is None


def test_numbers_that_are_none(base: Path) -> None:
    tensors = {"lora_A": torch.full((1, 8), math.nan), "lora_B": torch.ones(12, 1)}
    numbers = {"rank": 1, "alpha": 1.0, "dropout": 0.0, "rslora": False}
    file = weights.AdapterFile({"blocks.0.up": weights.LayerWeights("lora", numbers, tensors)})
    (layer,) = adapters.report(file, base).adapters[0].layers
    assert (layer.norm, layer.note) == (None, "it has NaN or infinity")


def test_an_update_of_nothing(base: Path, tmp_path: Path) -> None:
    model = Model()
    path = adapters.inject(model, LoRA(rank=2), "up").save_pretrained(tmp_path / "new")
    found = adapters.report([path, path], base)
    (layer, *_) = found.adapters[0].layers
    assert (layer.norm, layer.relative, layer.singular_values) == (0, 0, ())
    assert (layer.effective_rank, layer.stable_rank) == (0, 0)
    assert (found.overlaps[0].cosine, found.overlaps[0].layers) == (None, ())
    assert [one.name for one in found.adapters] == [str(path), f"{path} (2)"]


def test_patches_and_progress(base: Path) -> None:
    model = Model()
    patch = adapters.inject(model, LoRA(rank=2), "up", name="style", seed=0)
    perturb(patch, 0)
    steps: list[tuple[int, int]] = []
    found = adapters.report(patch, base, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(1, 2), (2, 2)]
    assert [layer.path for layer in found.adapters[0].layers] == ["blocks.0.up", "blocks.1.up"]
    assert found.adapters[0].name == "style"
    down = {"blocks.0.down": (8, 12), "blocks.1.down": (8, 12)}
    assert found.untouched == {**down, "conv": (6, 4, 3, 3), "embed": (20, 8)}


def test_nothing_to_report_on() -> None:
    with pytest.raises(AdapterError, match="nothing to report on"):
        adapters.report([])


# The page


def test_pages_are_all_that_needs_jinja2() -> None:
    code = (
        "import sys, adapters; adapters.inject, adapters.load, adapters.merge_files;"
        " assert 'jinja2' not in sys.modules; import adapters.reports.facts, adapters.reports.fit;"
        " assert 'jinja2' not in sys.modules; adapters.report; assert 'jinja2' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(adapters.__file__).parents[1])


@pytest.fixture
def found(base: Path, tmp_path: Path) -> Report:
    return adapters.report([made(tmp_path / "one", LoRA(rank=3)), made(tmp_path / "two", LoRA(rank=2), seed=2)], base)


def test_the_same_report_is_the_same_page(found: Report, tmp_path: Path) -> None:
    one, two = found.save(tmp_path / "one.html"), found.save(tmp_path / "two.html")
    assert one.read_bytes() == two.read_bytes()
    assert one.read_text("utf-8") == found.to_html()


def test_without_plotly_a_report_says_how_to_get_it(
    found: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    load: Callable[..., Any] = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("plotly"):
            raise ImportError(name)
        return load(name, *args, **kwargs)

    adapters.reports.html._plotly.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(AdapterError, match=re.escape("pip install 'fluxion-adapters[report]'")):
        found.save(tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
    assert "blocks" in found._repr_html_()


def test_thousands_of_layers_are_cut_to_those_that_change_most() -> None:
    numbers = {"rank": 1, "alpha": 1.0, "dropout": 0.0, "rslora": False}
    layers = {
        f"layers.{number}.up": weights.LayerWeights(
            "lora", numbers, {"lora_A": torch.full((1, 4), float(number)), "lora_B": torch.ones(4, 1)}
        )
        for number in range(3500)
    }
    page = adapters.report(weights.AdapterFile(layers)).to_html()
    assert "500 are left out here" in page
    assert page.count('<tr><th scope="row">layers.') == 3000
    assert "layers.499.up<" not in page
    assert "layers.500.up<" in page
