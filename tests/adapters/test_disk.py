"""Merging from disk to disk makes of files what merging in memory makes of the model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
import weights
from adapters import AdapterError, LayerMismatchError, LoRA
from tests.adapters.pipeline import pipeline
from tests.adapters.pretrained import build
from tests.adapters.test_methods import PAIRS, Product, close, named, perturb

# Transposed weights, tied embeddings, convolutions, stacked experts, biases or none.
MODELS = ["bert", "gpt2", "llama", "t5", "mixtral", "whisper", "clip", "unet", "flux", "sd3", "vae"]


def tensors_in(path: Path) -> dict[str, Tensor]:
    """All tensors in a file, or in all files of a folder."""
    files = [path] if path.is_file() else sorted(path.glob("**/*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def filled(model: Any, method: Any, path: Path, seed: int = 0, targets: Any = None, exclude: Any = None) -> Path:
    """An adapter that does something, in a file; the model is left as it was."""
    patch = adapters.inject(model, method, targets, exclude, seed=seed)
    perturb(patch, seed)
    patch.save_pretrained(path, format="fluxion")
    patch.eject()
    return path


def merge(model: Any, sources: Mapping[Path, float]) -> None:
    """Load and merge, all of them before any is rounded."""
    found = [adapters.load(model, path, name=f"{i}", scale=scale) for i, (path, scale) in enumerate(sources.items())]
    for patch in found:
        patch.merge()


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype, name
        torch.testing.assert_close(tensor, expected[name], msg=lambda text, name=name: f"{name}: {text}")  # type: ignore[misc]


# Layers that share a tensor, for which LoRA is for one or the other.
TIED = {
    "gpt2": ["wte", "lm_head"],
    "llama": ["embed_tokens", "lm_head"],
    "t5": ["shared", "embed_tokens", "lm_head"],
    "whisper": ["decoder.embed_tokens", "proj_out"],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_real_models(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """To the bit, in one file and in shards, also those layers where methods meet."""
    model: Any = build(name).model.to(dtype)
    model.save_pretrained(tmp_path / "base", max_shard_size="15KB" if dtype is torch.float32 else "50GB")
    names = sorted(path.name for path in (tmp_path / "base").iterdir())
    assert (len(names) > 3) == (dtype is torch.float32)
    tied = TIED.get(name)

    def some(path: str, module: nn.Module) -> bool:
        return "v" not in path.rpartition(".")[2]

    sources = {
        filled(model, LoRA(rank=2), tmp_path / "one.safetensors", 1, exclude=tied): 0.7,
        filled(model, LoRA(rank=4, alpha=1), tmp_path / "two.safetensors", 2, exclude=tied): -0.5,
        filled(model, adapters.DoRA(rank=3), tmp_path / "three.safetensors", 3, some, exclude=tied): 1.0,
    }
    adapters.merge_files(tmp_path / "base", sources, tmp_path / "merged")
    assert sorted(path.name for path in (tmp_path / "merged").iterdir()) == names
    loaded = type(model).from_pretrained(tmp_path / "merged", dtype=dtype)
    merge(model, sources)
    expected = dict(model.named_parameters())
    found = {name: parameter for name, parameter in loaded.named_parameters() if name in expected}
    assert len(found) > 0.9 * len(list(loaded.named_parameters()))
    assert_close(found, expected)
    transposed = ("attn.c_", "mlp.c_", "relative_attention_bias")  # Summed in another order.
    other = {key: parameter for key, parameter in found.items() if not any(part in key for part in transposed)}
    assert [key for key, parameter in other.items() if not torch.equal(parameter, expected[key])] == []


# Of what is computed when it is used, a checkpoint has no weight.
COMPUTED = ("weight norm", "old weight norm", "orthogonal")


def in_files(product: Product, folder: Path) -> tuple[Path, Path]:
    """A model and an adapter for it that does something. Embeddings are called so, as in any model."""
    patch = product.inject(seed=0)
    perturb(patch, 0)
    file = patch.adapter_file()
    patch.eject()
    base = {name: tensor.clone() for name, tensor in product.model.state_dict().items()}
    if isinstance(product.model, nn.Sequential) and isinstance(product.model[0], nn.Embedding):
        file = replace(file, layers={"embed": file.layers["0"]})
        base = {"embed.weight": base["0.weight"]}
    weights.save(base, folder / "base.safetensors")
    return folder / "base.safetensors", weights.write_adapter(file, folder / "adapter.safetensors", "fluxion")


def in_memory(product: Product, adapter: Path, scale: float) -> dict[str, Tensor]:
    """The parameters of the model with an adapter merged."""
    file = weights.read_adapter(adapter)
    if isinstance(product.model, nn.Sequential):
        file = replace(file, layers={path.replace("embed", "0"): layer for path, layer in file.layers.items()})
    adapters.load(product.model, file, scale=scale).merge()
    return dict(product.model.named_parameters(remove_duplicate=False))


# A checkpoint does not say how many groups a convolution has.
UNKNOWN = {("ia3 of the input", "depthwise conv2d")}
# Cut to its rank when it is saved, and only then.
UNSAVED = "pruned adalora"


@pytest.mark.parametrize("pair", [case for case in PAIRS if case.values[0][0] != UNSAVED], ids=named)
def test_methods_on_kinds_of_layers(pair: tuple[str, str], tmp_path: Path) -> None:
    variant, kind = pair
    product, merged = Product(variant, kind), tmp_path / "merged.safetensors"
    base, adapter = in_files(product, tmp_path)
    computed = kind in COMPUTED and variant != "bitfit"
    if computed or (variant, kind) in UNKNOWN or not product.variant.method.mergeable:
        with pytest.raises(AdapterError, match=r"cannot have|there is no layer|does not change weights|in the file"):
            adapters.merge_files(base, {adapter: 0.7}, merged)
        assert not merged.exists()
        return
    before = weights.open(base)
    if variant == "lora with bias" and not any(name.endswith("bias") for name in before):
        with pytest.raises(AdapterError, match="adds a bias"):
            adapters.merge_files(base, {adapter: 0.7}, merged)
        return
    adapters.merge_files(base, {adapter: 0.7}, merged)
    expected = in_memory(product, adapter, 0.7)
    assert weights.open(merged).keys() == before.keys()
    renamed = isinstance(product.model, nn.Sequential)
    for name, tensor in weights.open(merged).items():
        parameter = expected.get(name.replace("embed", "0") if renamed else name)
        close(tensor, before[name] if parameter is None else parameter.detach())
    assert any(not torch.equal(tensor, before[name]) for name, tensor in weights.open(merged).items())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small language model, in a folder."""
    folder = tmp_path_factory.mktemp("base")
    model: Any = build("llama").model
    model.save_pretrained(folder / "model")
    filled(model, LoRA(rank=2), folder / "style.safetensors", targets=["q_proj", "v_proj"])
    return folder


def test_the_same_adapter_twice_and_in_memory(base: Path, tmp_path: Path) -> None:
    style = base / "style.safetensors"
    adapters.merge_files(base / "model", [(style, 0.5), (weights.read_adapter(style), 0.25)], tmp_path / "a")
    adapters.merge_files(base / "model", {style: 0.75}, tmp_path / "b")
    for name, tensor in tensors_in(tmp_path / "a").items():
        torch.testing.assert_close(tensor, tensors_in(tmp_path / "b")[name.replace("a/", "b/")])


def test_one_rounding_to_another_type(base: Path, tmp_path: Path) -> None:
    style = {base / "style.safetensors": 1.0}
    adapters.merge_files(base / "model", style, tmp_path / "wide.safetensors")
    adapters.merge_files(base / "model", style, tmp_path / "half", dtype=torch.bfloat16)
    wide = weights.open(tmp_path / "wide.safetensors")
    assert all(torch.equal(tensor, wide[name].bfloat16()) for name, tensor in weights.open(tmp_path / "half").items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_model_without_its_head_or_with_one(tmp_path: Path) -> None:
    """As in checkpoints of transformers, whose models with a head have the others as a part of them."""
    whole: Any = build("bert").model
    whole.save_pretrained(tmp_path / "whole")
    whole.bert.save_pretrained(tmp_path / "part")
    on_whole = filled(whole, LoRA(rank=2), tmp_path / "whole.safetensors", targets="query")
    on_part = filled(whole.bert, LoRA(rank=2), tmp_path / "part.safetensors", targets="query")
    assert next(iter(weights.read_adapter(on_whole).layers)).startswith("bert.encoder.")
    assert next(iter(weights.read_adapter(on_part).layers)).startswith("encoder.")
    for number, adapter in enumerate((on_whole, on_part)):
        for kind in ("whole", "part"):
            adapters.merge_files(tmp_path / kind, {adapter: 1.0}, tmp_path / f"{kind}{number}")
    for kind in ("whole", "part"):
        one, other = (weights.open(tmp_path / f"{kind}{number}") for number in range(2))
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
        changed = [name for name, tensor in one.items() if not torch.equal(tensor, weights.open(tmp_path / kind)[name])]
        assert len(changed) == 2


def test_a_pipeline(tmp_path: Path) -> None:
    """With a file of kohya's kind for two of its models; the others are copied, and all of it loads."""
    pipe = pipeline().pipe
    pipe.save_pretrained(tmp_path / "pipe")
    patch = adapters.inject(pipe, LoRA(rank=2), targets=["to_q", "q_proj", "to_out.0"], exclude="vae.**", seed=0)
    perturb(patch, 0)
    patch.save_pretrained(tmp_path / "kohya.safetensors", format="lycoris")
    patch.eject()
    adapters.merge_files(tmp_path / "pipe", {tmp_path / "kohya.safetensors": 0.6}, tmp_path / "merged")
    merged, expected = pipeline(), pipeline()
    none = dict.fromkeys(("safety_checker", "feature_extractor", "tokenizer"))
    merged.pipe = type(pipe).from_pretrained(tmp_path / "merged", **none)
    adapters.load(expected.pipe, tmp_path / "kohya.safetensors", scale=0.6).merge()
    assert all(map(torch.equal, merged(), expected()))
    with pytest.raises(weights.FileFormatError, match="several models"):
        adapters.merge_files(tmp_path / "pipe", {tmp_path / "kohya.safetensors": 1.0}, tmp_path / "one.safetensors")


def refused(base: Path, adapter: Path, match: str, error: type[Exception] = AdapterError) -> None:
    merged = adapter.with_name("merged")
    with pytest.raises(error, match=match):
        adapters.merge_files(base, {adapter: 1.0}, merged)
    assert not merged.exists()
    assert not any(path.name.startswith(".") for path in merged.parent.iterdir())


def test_layers_of_another_model_are_listed(base: Path, tmp_path: Path) -> None:
    adapter = filled(build("gpt2").model, LoRA(rank=2), tmp_path / "other.safetensors", targets="c_attn")
    refused(base / "model", adapter, r"other\.safetensors: .*no layer transformer\.h\.0\.attn", LayerMismatchError)
    wide: Any = build("llama").model
    wide.model.layers[0].self_attn.q_proj = nn.Linear(16, 18)
    adapter = filled(wide, LoRA(rank=2), tmp_path / "wide.safetensors", targets="layers.0.self_attn.q_proj")
    refused(base / "model", adapter, r"lora_B is \(18, 2\) in the file, \(16, 2\) in the model", LayerMismatchError)


def test_what_is_no_change_of_weights_is_refused(base: Path, tmp_path: Path) -> None:
    adapter = filled(build("llama").model, adapters.Bottleneck(size=2), tmp_path / "a.safetensors", targets="mlp")
    refused(base / "model", adapter, "does not change weights")
    with pytest.raises(AdapterError, match="no adapters"):
        adapters.merge_files(base / "model", {}, tmp_path / "merged")
    with pytest.raises(AdapterError, match="finite"):
        adapters.merge_files(base / "model", {base / "style.safetensors": float("nan")}, tmp_path / "merged")


def test_one_tensor_that_is_two_weights(base: Path, tmp_path: Path) -> None:
    """To adapt the embedding alone would change the head too; whole rows are meant for both."""
    model: Any = build("llama").model
    adapter = filled(model, LoRA(rank=2), tmp_path / "embedding.safetensors", targets="embed_tokens")
    refused(base / "model", adapter, "embedding and the output head of the model at once")
    adapter = filled(model, LoRA(rank=2), tmp_path / "head.safetensors", targets="lm_head")
    refused(base / "model", adapter, "there is no layer lm_head")
    rows = filled(model, adapters.TrainableTokens((3, 5)), tmp_path / "rows.safetensors")
    adapters.merge_files(base / "model", {rows: 1.0}, tmp_path / "merged")
    loaded = type(model).from_pretrained(tmp_path / "merged")
    merge(model, {rows: 1.0})
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def test_codes_are_no_numbers(base: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "style.safetensors"
    shutil.copy(base / "style.safetensors", adapter)
    shutil.copytree(base / "model", tmp_path / "codes")
    settings = json.loads((tmp_path / "codes" / "config.json").read_text())
    (tmp_path / "codes" / "config.json").write_text(json.dumps({**settings, "quantization_config": {"bits": 4}}))
    refused(tmp_path / "codes", adapter, "is quantized")
    tensors = dict(weights.open(base / "model"))
    name = "model.layers.0.self_attn.q_proj.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    weights.save(tensors, tmp_path / "small.safetensors")
    adapters.merge_files(tmp_path / "small.safetensors", {adapter: 1.0}, tmp_path / "out.safetensors")
    assert weights.open(tmp_path / "out.safetensors").infos[name].dtype is torch.float8_e4m3fn
    (tmp_path / "out.safetensors").unlink()
    weights.save({**tensors, f"{name}_scale": torch.ones(1)}, tmp_path / "small.safetensors")
    refused(tmp_path / "small.safetensors", adapter, "is quantized")
