"""Each file is of one format."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import adapters
import weights
from adapters import DoRA, LoRA
from weights import formats
from weights.formats import Probe, writable

A, B, LENGTHS = torch.randn(2, 6), torch.randn(9, 2), torch.randn(9)
FILES = {
    "torchtune": {"layers.0.attn.q_proj.lora_a.weight": A, "layers.0.attn.q_proj.lora_b.weight": B},
    "torchtune dora": {"x.q_proj.lora_a.weight": A, "x.q_proj.lora_b.weight": B, "x.q_proj.magnitude": LENGTHS},
    "cloneofsimo": {"unet:0:up": B, "unet:0:down": A},
    "cloneofsimo token": {"text_encoder:3:up": B, "text_encoder:3:down": A, "<s1>": LENGTHS},
    "lycoris": {"lora_unet_x.lora_up.weight": B, "lora_unet_x.lora_down.weight": A},
    "comfyui": {"diffusion_model.x.lora_up.weight": B, "diffusion_model.x.lora_down.weight": A},
    "diffusers": {"unet.x.lora_B.weight": B, "unet.x.lora_A.weight": A},
}


def recognised(path: Path) -> list[str]:
    return formats.recognised(Probe(path))


@pytest.mark.parametrize("case", FILES)
@pytest.mark.parametrize("config", [None, {"r": 2, "lora_alpha": 4}, {"r": 2, "lora_alpha": 4, "peft_type": "LORA"}])
def test_files_of_tensors(tmp_path: Path, case: str, config: object) -> None:
    """Whatever settings are beside them, where the file itself is given."""
    path = weights.save(FILES[case], tmp_path / "x.safetensors")
    if config is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert recognised(path) == case.split()[:1]


@pytest.mark.parametrize("form", writable())
@pytest.mark.parametrize("method", [LoRA(rank=2), DoRA(rank=2)])
def test_what_is_written(tmp_path: Path, form: str, method: adapters.Method) -> None:
    model = nn.ModuleDict({"fc": nn.Linear(6, 9), "out": nn.Linear(9, 2)})
    path = tmp_path / ("x.safetensors" if form == "lycoris" else "x")
    adapters.inject(model, method).save_pretrained(path, format=form)
    files = [path] if path.is_file() else [path, *path.glob("*.safetensors"), *path.glob("*.json")]
    assert [recognised(file) for file in files] == [[form]] * len(files)


def test_gguf(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    assert recognised(path) == recognised(tmp_path) == ["gguf"]
    weights.save(FILES["lycoris"], tmp_path / "x.safetensors")
    with pytest.raises(weights.FileFormatError, match="in lycoris and in gguf format; give the file you mean"):
        weights.read_adapter(tmp_path)


def test_two_that_can_read_a_file_are_both_named(tmp_path: Path) -> None:
    """As files of PEFT with names of tensors, or settings, that are not PEFT's."""
    path = weights.save(FILES["comfyui"], tmp_path / "adapter_model.safetensors")
    for config in ({"peft_type": "LORA", "r": 2}, {"r": 2, "lora_alpha": 4}):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        assert recognised(path) == recognised(tmp_path) == ["peft", "comfyui"]
        with pytest.raises(weights.FileFormatError, match="in peft and in comfyui format; give the file you mean"):
            weights.read_adapter(tmp_path)


def test_a_file_beside_another_kind_of_file_is_not_chosen_in_silence(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.close):
        write()
    weights.save(FILES["comfyui"], tmp_path / "x.safetensors")
    assert recognised(tmp_path) == ["comfyui", "gguf"]


def test_the_surest_wins(tmp_path: Path) -> None:
    """A file with names of two formats is of the one that has a mark, whichever its other names are."""
    for other, name in (("torchtune", "layers"), ("lycoris", "lora_unet_x"), ("cloneofsimo", "unet:0")):
        path = weights.save({**FILES["comfyui"], **FILES[other]}, tmp_path / "x.safetensors")
        assert recognised(path) == [other] and name in str([*FILES[other]])


def test_another_name_of_a_format(tmp_path: Path) -> None:
    layer = weights.LayerWeights("full", {}, {"diff": torch.ones(3, 2)})
    for name in ("kohya", "lycoris"):
        weights.write_adapter(weights.AdapterFile({"fc": layer}), tmp_path / f"{name}.safetensors", name)
    assert (tmp_path / "kohya.safetensors").read_bytes() == (tmp_path / "lycoris.safetensors").read_bytes()
    assert weights.read_adapter(tmp_path / "kohya.safetensors").format == "lycoris"


@settings(max_examples=100)
@given(
    content=st.binary(max_size=100) | st.sampled_from([b"GGUF", b"{", b"[" * 9999, b'{"lora_parameters":1}', b"\xff"]),
    names=st.sets(
        st.sampled_from(["x.safetensors", "adapters.safetensors", "adapter_model.safetensors", "adapter.safetensors"])
        | st.sampled_from(["adapter_config.json", "x.gguf", "x.bin"]),
        min_size=1,
    ),
)
def test_what_is_nothing(tmp_path_factory: pytest.TempPathFactory, content: bytes, names: set[str]) -> None:
    folder = tmp_path_factory.mktemp("x")
    for name in names:
        (folder / name).write_bytes(content)
    for path in (folder, *folder.iterdir(), folder / "missing"):
        recognised(path)
        with pytest.raises(weights.WeightsError):
            weights.read_adapter(path)
