"""The difference of two checkpoints as a LoRA, and adapters in files made into one, on real models."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel

import adapters
import weights
from adapters import AdapterError, LoRA
from tests.adapters.cli.files import MINILM, by_peft
from tests.adapters.pretrained import build
from tests.adapters.test_methods import perturb
from tests.processes import COMMAND, start


def build_model(name: str) -> Any:
    return build(name).model


Change = Callable[[str, Tensor], Tensor]


def checkpoint(folder: Path, model: Any, change: Change | None = None, **options: Any) -> Path:
    """A model in a folder, with other values where a change makes some; the model is left as it was."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if change is not None:
        model.load_state_dict({name: change(name, tensor) for name, tensor in state.items()})
    model.save_pretrained(folder, **options)
    model.load_state_dict(state)
    return folder


def low_rank(name: str, tensor: Tensor) -> Tensor:
    """What adding a product of rank 2 makes of a weight."""
    if not (tensor.ndim in (2, 4) and tensor.is_floating_point()):
        return tensor
    generator = torch.Generator().manual_seed(len(name))
    flat = tensor.flatten(1)
    up, down = torch.randn(len(flat), 2, generator=generator), torch.randn(2, flat.shape[1], generator=generator)
    return tensor + 0.01 * (up @ down).view_as(tensor)


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "mixtral", "whisper", "clip", "unet", "sd3"])
def test_merged_into_the_base_again_it_is_the_tuned_model(name: str, tmp_path: Path) -> None:
    model = build_model(name)
    base, tuned = checkpoint(tmp_path / "base", model), checkpoint(tmp_path / "tuned", model, low_rank)
    made = adapters.extract_files(base, tuned, tmp_path / "lora", rank=4)
    assert made.ranks
    assert max(made.ranks.values()) == 2
    assert max(made.errors.values()) < 1e-4
    adapters.merge_files(base, {tmp_path / "lora": 1.0}, tmp_path / "merged")
    left = 0
    for path in tuned.glob("*.safetensors"):
        merged, before = load_file(tmp_path / "merged" / path.name), load_file(base / path.name)
        for key, tensor in load_file(path).items():
            if key in made.left_out:
                assert torch.equal(merged[key], before[key])
                left += 1
            else:
                torch.testing.assert_close(merged[key], tensor, msg=lambda text, key=key: f"{key}: {text}")  # type: ignore[misc]
    assert left == len(made.left_out)


def two_layers() -> nn.Module:
    model = AutoModel.from_pretrained(MINILM)
    model.encoder.layer = model.encoder.layer[:2]
    return model


def test_what_training_changes_is_kept_as_far_as_the_rank_goes(tmp_path: Path) -> None:
    """Two layers of a real pretrained model, trained for a few steps: the outputs come nearer with the rank."""
    model = two_layers()
    checkpoint(tmp_path / "base", model)
    words = torch.randint(1000, 2000, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(words).last_hidden_state
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=1e-4)
    for _ in range(3):
        model(words).last_hidden_state[:, 0].square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        after = model(words).last_hidden_state
    checkpoint(tmp_path / "tuned", model)
    distances = [float((after - before).norm())]
    for rank in (2, 16, 384):
        made = adapters.extract_files(tmp_path / "base", tmp_path / "tuned", tmp_path / f"{rank}", rank=rank)
        fresh = two_layers()
        adapters.load(fresh, tmp_path / f"{rank}")
        with torch.no_grad():
            distances.append(float((fresh(words).last_hidden_state - after).norm()))
    assert distances == sorted(distances, reverse=True)
    assert max(made.errors.values()) < 1e-5
    assert {name.rpartition(".")[2] for name in made.left_out} <= {"bias", "weight"}  # Of norms.
    assert all("bias" in name or "LayerNorm" in name for name in made.left_out)
    assert set(made.left_out.values()) == {"not a 2-D weight"}


def test_the_error_is_what_is_missing_with_the_rounding_of_the_dtype(tmp_path: Path) -> None:
    model = build_model("bert")
    base = checkpoint(tmp_path / "base", model)
    tuned = checkpoint(tmp_path / "tuned", model, lambda name, t: t + torch.randn_like(t) if t.ndim == 2 else t)
    made = adapters.extract_files(base, tuned, tmp_path / "lora", rank=3, dtype=torch.bfloat16)
    before, after = load_file(base / "model.safetensors"), load_file(tuned / "model.safetensors")
    file = weights.read_adapter(tmp_path / "lora")
    for path, error in made.errors.items():
        difference = after[f"{path}.weight"] - before[f"{path}.weight"]
        tensors = [tensor.float() for _, tensor in sorted(file.layers[path].tensors.items())]
        product = tensors[1] @ tensors[0]
        product = product.T if "embedding" in path else product
        assert error == pytest.approx(float((difference - product).norm() / difference.norm()), rel=1e-4)
        best = torch.linalg.svdvals(difference)
        assert error <= 1.05 * float(best[3:].norm() / best.norm()) + 2**-8
    assert {tensor.dtype for layer in file.layers.values() for tensor in layer.tensors.values()} == {torch.bfloat16}


def test_an_energy_is_kept_at_each_layer(tmp_path: Path) -> None:
    model = build_model("bert")
    base = checkpoint(tmp_path / "base", model)
    tuned = checkpoint(tmp_path / "tuned", model, lambda name, t: t + torch.randn_like(t) if t.ndim == 2 else t)
    made = adapters.extract_files(base, tuned, tmp_path / "lora", energy=0.7)
    assert all(1 - error**2 >= 0.7 - 1e-6 for error in made.errors.values())
    assert len(set(made.ranks.values())) > 1
    few = adapters.extract_files(base, tuned, tmp_path / "few", energy=0.7, rank=2)
    assert set(few.ranks.values()) == {2}


def test_shards_and_half_precision_and_one_seed_one_file(tmp_path: Path) -> None:
    model = build_model("llama").to(torch.bfloat16)
    base = checkpoint(tmp_path / "base", model, max_shard_size=5_000)
    tuned = checkpoint(tmp_path / "tuned", model, lambda name, t: t + 0.1 * torch.randn_like(t) if t.ndim == 2 else t)
    assert len([*base.glob("*.safetensors")]) > 1
    steps: list[tuple[int, int]] = []
    for name in ("one", "other"):
        made = adapters.extract_files(base, tuned, tmp_path / name, rank=2, progress=lambda *step: steps.append(step))
    assert steps[-1][0] == steps[-1][1] > 0
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("one", "other")]
    assert files[0] == files[1]
    settings = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(base)
    peft.PeftModel.from_pretrained(build_model("llama"), tmp_path / "one")
    assert made.format == "peft"


def test_an_embedding_that_is_the_head_too_is_left_out(tmp_path: Path) -> None:
    model = build_model("gpt2")
    assert model.config.tie_word_embeddings
    base, tuned = checkpoint(tmp_path / "base", model), checkpoint(tmp_path / "tuned", model, low_rank)
    made = adapters.extract_files(base, tuned, tmp_path / "lora", rank=4)
    assert {name: why for name, why in made.left_out.items() if "head" in why}.keys() == {"transformer.wte.weight"}


def test_a_pipeline_keeps_the_names_of_its_models(tmp_path: Path) -> None:
    for name, change in (("base", None), ("tuned", low_rank)):
        checkpoint(tmp_path / name / "unet", build_model("unet"), change)
        checkpoint(tmp_path / name / "text_encoder", build_model("clip").text_model, change)
    # Two builds of a model are not the same: take the values of one.
    torch.default_generator.manual_seed(0)
    made = adapters.extract_files(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora.safetensors", rank=2)
    file = weights.read_adapter(tmp_path / "lora.safetensors")
    assert sorted(file.components) == ["text_encoder", "unet"]
    assert {path.partition(".")[0] for path in made.ranks} == {"text_encoder", "unet"}


def test_what_cannot_be_extracted_is_refused_in_words(tmp_path: Path) -> None:
    plain = {"a.weight": torch.randn(4, 4), "a.bias": torch.randn(4), "ids": torch.arange(4)}

    def saved(name: str, **changes: Tensor | None) -> Path:
        tensors = {**plain, **{key.replace("_", "."): value for key, value in changes.items()}}
        kept = {key: value for key, value in tensors.items() if value is not None}
        return weights.save(kept, tmp_path / f"{name}.safetensors")

    base, out = saved("base"), tmp_path / "out"
    codes = torch.ones(4, 4, dtype=torch.int8)
    large = {"rank": 1, "dtype": torch.float16}
    cases: dict[str, tuple[Path, dict[str, Any], str]] = {
        "no size": (base, {}, "by rank=, or by the energy="),
        "no rank": (base, {"rank": 0}, "rank= has to be an integer"),
        "no share": (base, {"energy": 1.5}, "energy= has to be more than 0 and at most 1"),
        "the same": (base, {"rank": 1}, "differ in nothing"),
        "a bias": (saved("bias", a_bias=torch.zeros(4)), {"rank": 1}, "differ only in a.bias"),
        "integers": (saved("ids", ids=torch.ones(4, dtype=torch.int64)), {"rank": 1}, "differ only in ids"),
        "another shape": (
            saved("shape", a_weight=torch.randn(4, 5)),
            {"rank": 1},
            r"a.weight \(shape mismatch\): there",
        ),
        "too large": (saved("large", a_weight=1e12 * torch.ones(4, 4)), large, "a has numbers that are too large"),
        "NaN": (saved("nan", a_weight=torch.full((4, 4), torch.nan)), {"rank": 1}, "a.weight is not finite"),
        "codes": (saved("codes", a_weight=codes), {"rank": 1}, "a.weight is quantized"),
        "another model": (weights.save({"b": torch.ones(1)}, tmp_path / "b.safetensors"), {"rank": 1}, "no tensor of"),
    }
    for name, (tuned, options, message) in cases.items():
        with pytest.raises(AdapterError, match=message):
            adapters.extract_files(base, tuned, out, **options)
        assert not out.exists(), name


# Adapters in files


def product(layer: weights.LayerWeights) -> Tensor:
    down, up = (tensor for _, tensor in sorted(layer.tensors.items()))
    return up @ down


def test_combined_files_are_what_combined_patches_are(tmp_path: Path) -> None:
    model = build_model("bert")
    paths = []
    for number, method in enumerate((LoRA(rank=3), LoRA(rank=2, alpha=7.0))):
        patch = adapters.inject(model, method, seed=number, name=str(number))
        perturb(patch, number)
        paths.append(patch.save_pretrained(tmp_path / str(number)))
    both = dict(zip(paths, (0.7, -0.3), strict=True))
    steps: list[tuple[int, int]] = []
    for options in (
        {"how": "exact"},
        {"how": "svd", "rank": 2},
        {"how": "svd", "energy": 0.6},
        {"how": "magnitude", "density": 0.5, "rank": 3},
        {"how": "ties", "density": 0.4},
    ):
        there = adapters.combine(model, {"0": 0.7, "1": -0.3}, name="both", **options)
        made = adapters.combine_files(both, tmp_path / "both", progress=lambda *step: steps.append(step), **options)
        file = weights.read_adapter(tmp_path / "both")
        expected = there.adapter_file()
        assert made.errors == pytest.approx(there.errors, abs=2e-6)
        assert steps[-1] == (len(made.errors), len(made.errors))
        for path, layer in expected.layers.items():
            assert file.layers[path].hyperparameters["rank"] == made.ranks[path]
            torch.testing.assert_close(product(file.layers[path]), product(layer), rtol=1e-4, atol=1e-5)
        there.eject()


def test_with_the_base_any_method_that_adds(tmp_path: Path) -> None:
    model = build_model("bert")
    base = checkpoint(tmp_path / "base", model)
    patch = adapters.inject(model, adapters.LoHa(rank=2), seed=0)
    perturb(patch, 0)
    patch.save_pretrained(tmp_path / "loha.safetensors", format="lycoris")
    x = torch.arange(6).view(1, -1)
    expected = model(x)[0]
    patch.eject()
    with pytest.raises(AdapterError, match=r"loha.safetensors: .*give its base model"):
        adapters.resize_file(tmp_path / "loha.safetensors", tmp_path / "small", rank=4)
    made = adapters.resize_file(tmp_path / "loha.safetensors", tmp_path / "small", rank=4, base=base)
    assert max(made.errors.values()) < 1e-5  # A product of two of rank 2 has rank 4.
    adapters.load(model, tmp_path / "small")
    torch.testing.assert_close(model(x)[0], expected, rtol=1e-4, atol=1e-5)


def test_names_without_dots_stay_as_they_are(tmp_path: Path) -> None:
    """kohya's files, which nobody has a base model with dotted names for at hand."""
    model = build_model("clip")
    patch = adapters.inject(model, LoRA(rank=3), targets=["q_proj", "fc1"], seed=0)
    perturb(patch, 0)
    kohya = patch.save_pretrained(tmp_path / "kohya.safetensors", format="lycoris", component="text_encoder")
    base = checkpoint(tmp_path / "base", model)
    patch.eject()
    made = adapters.resize_file(kohya, tmp_path / "small.safetensors", rank=2)
    named = adapters.resize_file(kohya, tmp_path / "named.safetensors", rank=2, base=base, format="lycoris")
    assert made.format == "lycoris"
    assert load_file(made.path).keys() == load_file(named.path).keys() == load_file(kohya).keys()
    for key, tensor in load_file(made.path).items():
        assert torch.equal(tensor, load_file(named.path)[key]), key
    both = adapters.combine_files({kohya: 1.0, made.path: -1.0}, tmp_path / "both.safetensors")
    assert both.format == "lycoris"
    assert load_file(both.path).keys() == load_file(kohya).keys()
    for place, form in ((tmp_path / "folder", None), (tmp_path / "other.safetensors", "fluxion")):
        with pytest.raises(AdapterError, match=r"kohya.safetensors: .*give its base model, or"):
            adapters.resize_file(kohya, place, rank=2, format=form)
        assert not place.exists()


def test_resized_is_the_nearest_and_what_is_whole_stays(tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(MINILM)
    config = peft.LoraConfig(r=4, target_modules=["query"], modules_to_save=["pooler"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "style")
    made = adapters.resize_file(tmp_path / "style", tmp_path / "small", rank=2)
    file, source = weights.read_adapter(tmp_path / "small"), weights.read_adapter(tmp_path / "style")
    assert file.base_model == source.base_model
    whole = [path for path, layer in source.layers.items() if layer.method == "copy"]
    assert whole
    for path in whole:
        for name, tensor in source.layers[path].tensors.items():
            assert torch.equal(file.layers[path].tensors[name], tensor)
    for path, rank in made.ranks.items():
        a, b = source.layers[path].tensors["lora_A"], source.layers[path].tensors["lora_B"]
        singular = torch.linalg.svdvals(b @ a)
        assert rank == 2
        assert made.errors[path] == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-3)


def test_files_that_do_not_go_together_are_refused_with_their_names(tmp_path: Path) -> None:
    small = nn.ModuleDict({"a": nn.Linear(4, 4)})
    large = nn.ModuleDict({"a": nn.Linear(6, 4)})
    paths = []
    for name, model, method in (
        ("small", small, LoRA(rank=2)),
        ("large", large, LoRA(rank=2)),
        ("dora", small, adapters.DoRA(rank=2)),
    ):
        paths.append(adapters.inject(model, method, name=name, seed=0).save_pretrained(tmp_path / name))
    with pytest.raises(AdapterError, match=r"small: .*a: lora_A"):
        adapters.combine_files(dict.fromkeys(paths[:2], 1.0), tmp_path / "out")
    base = weights.save(small["a"].state_dict(prefix="a."), tmp_path / "base.safetensors")
    with pytest.raises(AdapterError, match="DoRA makes no update"):
        adapters.combine_files({paths[2]: 1.0}, tmp_path / "out", base=base)
    with pytest.raises(AdapterError, match="dora: a cannot be combined: the update by DoRA depends on the weight"):
        adapters.combine_files({paths[2]: 1.0}, tmp_path / "out")
    with pytest.raises(AdapterError, match="no adapters to combine"):
        adapters.combine_files({}, tmp_path / "out")
    with pytest.raises(AdapterError, match=r"The scale of .*small"):
        adapters.combine_files({paths[0]: float("nan")}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    """A real process is interrupted while it works, which the bar on its terminal shows."""
    for name in ("base", "tuned"):
        tensors = {f"{n}.weight": torch.randn(600, 600) for n in range(60)}
        weights.save(tensors, tmp_path / f"{name}.safetensors")
    terminal, end = pty.openpty()
    command = (COMMAND, "extract", "base.safetensors", "tuned.safetensors", "out", "--energy", "0.9")
    running = start(*command, settings={"COLUMNS": "120", "NO_COLOR": "1"}, cwd=tmp_path, stderr=end)
    os.close(end)
    shown = b""
    while not re.search(rb"MB +[0-9.]+ [kM]B/s +\d+:\d\d:\d\d", shown):
        shown += os.read(terminal, 1 << 16)  # Raises an OSError when the process has ended.
    running.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):
        while some := os.read(terminal, 1 << 16):
            shown += some
    os.close(terminal)
    printed, _ = running.communicate(timeout=60)
    assert (running.returncode, printed) == (130, b"")
    assert shown.endswith(b"Aborted!\r\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.safetensors", "tuned.safetensors"]


def test_peft_has_the_same_outputs_with_what_is_made(tmp_path: Path) -> None:
    style = by_peft(tmp_path / "style")
    adapters.combine_files({style: 0.5}, tmp_path / "half")
    words = torch.arange(1000, 1012).view(1, -1)
    model = AutoModel.from_pretrained(MINILM)
    adapters.load(model, style, scale=0.5)
    theirs = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(MINILM), tmp_path / "half")
    with torch.no_grad():
        torch.testing.assert_close(theirs(words)[0], model(words)[0], rtol=1e-4, atol=1e-5)
