"""GGUF files as llama.cpp's converter writes them from PEFT's adapters, against these in PEFT."""

from __future__ import annotations

import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
import weights
from adapters import AdapterError, LayerMismatchError
from tests.adapters.models import snapshot
from tests.thinned import examples
from weights.formats.common.gguf_file import GgufFile

SIZES = {
    "vocab_size": 40,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "tie_word_embeddings": False,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "granite": lambda: transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES)),
    "olmo": lambda: transformers.OlmoForCausalLM(transformers.OlmoConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=32)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, head_dim=32)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**SIZES, head_dim=32)),
    "gemma3": lambda: transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**SIZES, head_dim=32)),
    "olmo2": lambda: transformers.Olmo2ForCausalLM(transformers.Olmo2Config(**SIZES)),
    "smollm3": lambda: transformers.SmolLM3ForCausalLM(transformers.SmolLM3Config(**SIZES, pad_token_id=0)),
    "arcee": lambda: transformers.ArceeForCausalLM(transformers.ArceeConfig(**SIZES)),
    "phi3": lambda: transformers.Phi3ForCausalLM(transformers.Phi3Config(**SIZES, pad_token_id=0)),
    "starcoder2": lambda: transformers.Starcoder2ForCausalLM(transformers.Starcoder2Config(**SIZES)),
}
PERMUTED = {"arcee", "granite", "llama", "olmo", "smollm3"}
TOKENS = torch.randint(3, 40, (2, 7), generator=torch.Generator().manual_seed(0))


def model_of(name: str) -> nn.Module:
    torch.default_generator.manual_seed(0)
    return MODELS[name]().eval()


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def of_peft(name: str, targets: Any = "all-linear", **numbers: Any) -> tuple[dict[str, Tensor], float, Tensor]:
    """A random LoRA of PEFT on a model: its tensors, its alpha, and the outputs."""
    config = peft.LoraConfig(r=8, lora_alpha=12, target_modules=targets, **numbers)
    model = peft.get_peft_model(model_of(name), config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.normal_(std=0.2)
    state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    tensors = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    return tensors, 12.0, run(model)


def permuted(b: Tensor, heads: int) -> Tensor:
    """How the converter turns the rows of q and k into pairs side by side."""
    return b.reshape(heads, 2, b.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(b.shape)


def convert(
    path: Path,
    name: str,
    tensors: dict[str, Tensor],
    alpha: float,
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    **fields: Any,
) -> Path:
    """What llama.cpp's convert_lora_to_gguf.py does."""
    arch = {text: arch for arch, text in gguf.MODEL_ARCH_NAMES.items()}[name]
    writer = gguf.GGUFWriter(path, name)
    writer.add_type(fields.get("type", gguf.GGUFType.ADAPTER))
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_name("an adapter")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    names = gguf.get_tensor_name_map(arch, 2)
    for key, tensor in tensors.items():
        where, _, end = key.replace(".weight", "").rpartition(".")
        target = names.get_name(where)
        assert target is not None
        if name in PERMUTED and end == "lora_B" and where.endswith(("q_proj", "k_proj")):
            tensor = permuted(tensor, 4 if where.endswith("q_proj") else 2)
        if end == "lora_embedding_A":
            tensor = tensor.T
        data = gguf.quantize(tensor.float().contiguous().numpy(), kind)
        writer.add_tensor(f"{target}.weight.{'lora_a' if end.endswith('A') else 'lora_b'}", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("name", MODELS)
def test_the_outputs_are_those_in_peft(tmp_path: Path, name: str) -> None:
    tensors, alpha, expected = of_peft(name)
    path = convert(tmp_path / "lora.gguf", name, tensors, alpha)
    assert weights.read_adapter(path).layers.keys() == {key.rpartition(".lora_")[0] for key in tensors}
    model = model_of(name)
    base = run(model)
    assert (expected - base).abs().max() > 1e-2
    patch = adapters.load(model, path)
    assert len(patch.targets) == len(tensors) / 2
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)
    # Through PEFT's format and this library's own.
    for form in ("peft", "fluxion"):
        saved = patch.save_pretrained(tmp_path / form, format=form)
        other = model_of(name)
        adapters.load(other, saved)
        assert torch.equal(run(other), run(model))
    again = peft.PeftModel.from_pretrained(model_of(name), tmp_path / "peft").eval()
    torch.testing.assert_close(run(again), expected, atol=1e-5, rtol=1e-4)
    # In the model without its head, where paths begin otherwise.
    bare = model_of(name).model
    assert len(adapters.load(bare, path).targets) == len(tensors) / 2
    with torch.no_grad():
        torch.testing.assert_close(bare(TOKENS)[0], model.model(TOKENS)[0])


def test_embeddings(tmp_path: Path) -> None:
    tensors, alpha, expected = of_peft("llama", ["embed_tokens", "lm_head", "q_proj"])
    path = convert(tmp_path / "lora.gguf", "llama", tensors, alpha)
    model = model_of("llama")
    adapters.load(model, tmp_path)  # The only one in the folder.
    assert path.parent == tmp_path
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
def test_an_alpha_of_0_stands_for_the_rank(tmp_path: Path, alpha: float) -> None:
    tensors, _, _ = of_peft("qwen2", ["v_proj"])
    file = weights.read_adapter(convert(tmp_path / "lora.gguf", "qwen2", tensors, alpha))
    assert {layer.hyperparameters["alpha"] for layer in file.layers.values()} == {alpha or 8.0}
    assert file.metadata["general.name"] == "an adapter"


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q5_1", "Q4_0"])
def test_halves_and_quantised_numbers(tmp_path: Path, kind: str) -> None:
    """They are exactly what the reader of the package makes of them."""
    tensors, alpha, _ = of_peft("qwen2", ["down_proj"], rank_pattern={"down_proj": 32})
    path = convert(tmp_path / "lora.gguf", "qwen2", tensors, alpha, gguf.GGMLQuantizationType[kind])
    layers = weights.read_adapter(path).layers
    for there in gguf.GGUFReader(path).tensors:
        number, end = there.name.split(".")[1], there.name[-1].upper()
        mine = layers[f"model.layers.{number}.mlp.down_proj"].tensors[f"lora_{end}"]
        assert torch.equal(
            mine.float(), torch.from_numpy(gguf.dequantize(there.data, there.tensor_type).copy()).float()
        )
        assert mine.dtype == {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind, torch.float32)
    assert len(layers) == 2


def test_what_the_model_has_to_say(tmp_path: Path) -> None:
    tensors, alpha, expected = of_peft("llama", ["q_proj", "k_proj"])
    path = convert(tmp_path / "lora.gguf", "llama", tensors, alpha)
    model = model_of("llama")
    before = snapshot(model)
    plain = nn.Module()
    plain.model = model.model
    with pytest.raises(LayerMismatchError, match="the base model does not say how large they are: its config needs"):
        adapters.load(plain, path)
    model.config.head_dim = 12
    with pytest.raises(LayerMismatchError, match=r"_proj has (64|32) outputs, the model has heads of 12"):
        adapters.load(model, path)
    del model.config.head_dim
    assert snapshot(model) == before
    adapters.load(model, path)
    torch.testing.assert_close(run(model), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(weights.FileFormatError, match="which only its model resolves"):
        weights.write_adapter(weights.read_adapter(path), tmp_path / "peft")
    # Nothing is turned in other layers, and what is not can be written at once.
    tensors, alpha, expected = of_peft("llama", ["o_proj"])
    file = weights.read_adapter(convert(tmp_path / "lora.gguf", "llama", tensors, alpha))
    weights.write_adapter(file, tmp_path / "peft")
    torch.testing.assert_close(
        run(peft.PeftModel.from_pretrained(model_of("llama"), tmp_path / "peft").eval()), expected, atol=1e-5, rtol=1e-4
    )


def test_what_is_no_adapter_for_here(tmp_path: Path) -> None:
    tensors, alpha, _ = of_peft("qwen2", ["v_proj"])
    path = tmp_path / "lora.gguf"

    def refused(said: str) -> None:
        with pytest.raises(weights.FileFormatError, match=said):
            weights.read_adapter(path)

    convert(path, "qwen2", tensors, alpha, type="model")
    refused("is of the type 'model', which is no adapter")
    convert(path, "gptj", {}, alpha)
    refused("is for 'gptj', of which it is not known here how its weights were turned, only for arcee")
    convert(path, "qwen2", {}, alpha)
    refused("it has no tensors")
    convert(path, "qwen2", tensors, float("nan"))
    refused("its alpha is nan")
    convert(path, "qwen2", {key: t for key, t in tensors.items() if "lora_A" in key}, alpha)
    refused("`blk.0.attn_v.weight.lora_a` has no `blk.0.attn_v.weight.lora_b`")
    convert(path, "qwen2", {key: t[:4] for key, t in tensors.items()}, alpha)
    refused("a shape mismatch")
    convert(path, "qwen2", {key: t.expand(3, *t.shape) for key, t in tensors.items()}, alpha)
    refused("a shape mismatch")
    for name, tokens, said in (
        ("blk.0.attn_q.weight.lora_a", [1, 2], "aLoRA"),
        ("blk.0.attn_norm.weight", [], "'blk.0.attn_norm.weight' is not expected"),
        ("blk.x.attn_q.weight.lora_a", [], "is not expected"),
        ("rope_factors_long.weight.lora_a", [], "is not expected"),
        ("blk.{bid}.attn_q.weight.lora_a", [], "is not expected"),
    ):
        writer = gguf.GGUFWriter(path, "phi3")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        if tokens:
            writer.add_array("adapter.alora.invocation_tokens", tokens)
        writer.add_tensor(name, np.ones((4, 4), dtype=np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        refused(said)


def test_without_the_package(tmp_path: Path) -> None:
    tensors, alpha, _ = of_peft("qwen2", ["v_proj"])
    path = convert(tmp_path / "lora.gguf", "qwen2", tensors, alpha)
    script = f"""
import sys
sys.modules["gguf"] = None
import weights
try:
    weights.read_adapter({str(path)!r})
except weights.FileFormatError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path.cwd())
    assert done.stdout.strip().endswith("needs another package: pip install fluxion-adapters[gguf].")


# Hostile files


def start(fields: bytes = b"", tensors: int = 0, count: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, count) + fields


def text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (start(text(b"x") + struct.pack("<IIQ", 9, 0, 2**62), count=1), "cut short"),  # The package's reader hangs.
        (start(text(b"x") + struct.pack("<IIQ", 9, 8, 2**62), count=1), "cut short"),
        (start(text(b"x") + struct.pack("<IIQ", 9, 9, 1) * 3, count=1), "an array has the type 9"),
        (start(count=2**62), "cut short"),
        (start(tensors=2**62), "cut short"),
        (start(struct.pack("<Q", 2**63) + b"x", count=1), "cut short"),
        (start(text(b"\xff") + struct.pack("<IB", 0, 1), count=1), "utf-8"),
        (start((text(b"x") + struct.pack("<IB", 0, 1)) * 2, count=2), "'x' occurs twice"),
        (start(text(b"x") + struct.pack("<I", 77), count=1), "a field has the type 77"),
        (start(text(b"general.alignment") + struct.pack("<II", 4, 0), count=1), "its alignment is 0"),
        (start(text(b"x") + struct.pack("<I", 9), tensors=1), "tensor 'x' has 9 dimensions"),
        (start(text(b"x") + struct.pack("<IQQIQ", 2, 2**32, 2**32, 0, 0), tensors=1), "tensor 'x' has the shape"),
        (start(text(b"../x") + struct.pack("<IQIQ", 1, 1, 0, 0), tensors=1), "not allowed"),
        (start(version=1), "its version is none of 2, 3"),
        (b"GGUF", "cut short"),
    ],
)
def test_files_that_claim_more_than_they_have(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "lora.gguf"
    path.write_bytes(content)
    with pytest.raises(weights.FileFormatError, match=said):
        weights.read_adapter(path)


def test_tensors_that_share_bytes_or_have_too_few(tmp_path: Path) -> None:
    path = tmp_path / "lora.gguf"

    def refused(said: str, *infos: bytes) -> None:
        path.write_bytes(start(b"".join(infos), tensors=len(infos)) + bytes(4096))
        with pytest.raises(weights.FileFormatError, match=said):
            GgufFile.open(path).read()

    refused("has tensors that overlap", *(text(b"x%d" % n) + struct.pack("<IQIQ", 1, 512, 0, 0) for n in range(9)))
    refused("cut short at tensor 'x'", text(b"x") + struct.pack("<IQIQ", 1, 16, 0, 2**62))
    refused(r"tensor 'x' of \(16,\) is no Q4_0", text(b"x") + struct.pack("<IQIQ", 1, 16, 2, 0))
    refused(r"tensor 'x' of \(16,\) is no type 99", text(b"x") + struct.pack("<IQIQ", 1, 16, 99, 0))
    refused("'x' is of I8, which is not supported", text(b"x") + struct.pack("<IQIQ", 1, 16, 24, 0))


@examples(60, 200, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_damaged_files(data: st.DataObject) -> None:
    """A typed error, or a patch that runs and leaves no trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "lora.gguf")
        shapes = {"lora_A.weight": (2, 64), "lora_B.weight": (64, 2)}
        tensors = {f"model.layers.0.self_attn.q_proj.{end}": torch.randn(shape) for end, shape in shapes.items()}
        content = bytearray(convert(path, "llama", tensors, 2.0).read_bytes())
        length = len(content) - 2 * 64 * 2 * 4
        for _ in range(data.draw(st.integers(1, 3))):
            at = data.draw(st.integers(0, length))
            patch = data.draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 8, b"\0" * 8]))
            end = at + data.draw(st.sampled_from([len(patch), 0, 100]))
            content[at:end] = patch
        path.write_bytes(content)
        model = model_of("llama")
        before = snapshot(model)
        try:
            patch = adapters.load(model, path)
        except (AdapterError, weights.WeightsError):
            pass
        else:
            run(model)
            patch.eject()
        assert snapshot(model) == before
