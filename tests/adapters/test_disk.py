"""Merging from disk to disk makes of files what merging in memory makes of the model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
import weights
from adapters import AdapterError, LayerMismatchError, LoRA, Method
from tests.adapters.pipeline import pipeline
from tests.adapters.pretrained import build
from tests.adapters.test_methods import perturb

# Transposed weights, tied embeddings, convolutions, stacked experts, biases or none.
MODELS = ["bert", "gpt2", "llama", "t5", "mixtral", "whisper", "clip", "unet", "flux", "sd3", "vae"]


def tensors_in(path: Path) -> dict[str, Tensor]:
    """All tensors in a file, or in all files of a folder."""
    files = [path] if path.is_file() else sorted(path.glob("**/*.safetensors"))
    return {f"{file.parent.name}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def filled(model: Any, method: Any, path: Path, seed: int = 0, **where: Any) -> Path:
    """An adapter that does something, in a file; the model is left as it was."""
    patch = adapters.inject(model, method, seed=seed, **where)
    perturb(patch, seed)
    patch.save_pretrained(path, format="fluxion")
    patch.eject()
    return path


def in_memory(model: Any, sources: Mapping[Path, float]) -> None:
    """Load and merge, all of them before any is rounded."""
    found = [adapters.load(model, path, name=f"{i}", scale=scale) for i, (path, scale) in enumerate(sources.items())]
    for patch in found:
        patch.merge()


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
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
    model: Any = build(name).model.to(dtype)
    model.save_pretrained(tmp_path / "base")
    tied = TIED.get(name)
    sources = {
        filled(model, LoRA(rank=2), tmp_path / "one.safetensors", 1, exclude=tied): 0.7,
        filled(model, adapters.DoRA(rank=3), tmp_path / "two.safetensors", 2, exclude=tied): 1.0,
        filled(model, LoRA(rank=4, alpha=1), tmp_path / "three.safetensors", 3, exclude=tied): -0.5,
    }
    adapters.merge_files(tmp_path / "base", sources, tmp_path / "merged")
    in_memory(model, sources)
    loaded = type(model).from_pretrained(tmp_path / "merged", dtype=dtype)
    expected = dict(model.named_parameters())
    found = {n: p for n, p in loaded.named_parameters() if n in expected}
    assert found
    print(name, {n: (found[n].float()-expected[n].float()).abs().max().item() for n in found if not torch.equal(found[n], expected[n])})
