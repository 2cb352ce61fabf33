from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from diffusers import FluxTransformer2DModel
from transformers import AutoModel

import adapters
import weights
from tests.adapters.cli.files import MINILM, contents, done, fluxion, refused, serve, two_methods
from tests.adapters.pipeline import pipeline
from tests.weights.hub_server import HubServer


def assert_same(a: Path, b: Path) -> None:
    """The same layers, with the same bits."""
    one, other = weights.read_adapter(a), weights.read_adapter(b)
    assert one.layers.keys() == other.layers.keys()
    for name, layer in one.layers.items():
        assert layer.tensors.keys() == other.layers[name].tensors.keys()
        assert all(torch.equal(tensor, other.layers[name].tensors[key]) for key, tensor in layer.tensors.items())
        assert all(layer.hyperparameters[key] == other.layers[name].hyperparameters[key] for key in ("rank", "alpha"))


def test_names_without_dots_get_them_from_the_base(style: Path, kohya: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert done("convert", kohya, out, "--base", MINILM) == f"{out}: 12 layers in peft format, from lycoris.\n"
    assert_same(style, out)
    tokens = torch.tensor([[101, 7592, 2088, 102]])
    with torch.no_grad():
        outputs = [
            peft.PeftModel.from_pretrained(AutoModel.from_pretrained(MINILM), path)(tokens).last_hidden_state
            for path in (style, out)
        ]
    assert torch.equal(*outputs)


def test_without_a_base_they_stay_so(kohya: Path, tmp_path: Path) -> None:
    assert "--base" in refused("convert", kohya, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done("convert", kohya, tmp_path / "out.safetensors", "--to", "lycoris", "--dtype", "float16")
    assert weights.open(tmp_path / "out.safetensors").metadata == weights.open(kohya).metadata


def test_another_base_is_an_error(kohya: Path, tmp_path: Path) -> None:
    weights.save({"fc.weight": torch.zeros(2, 2), "top": torch.zeros(1)}, tmp_path / "base.safetensors")
    line = refused("convert", kohya, tmp_path / "out", "--base", tmp_path / "base.safetensors")
    assert "there is no layer text_encoder.encoder_layer_0" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["peft", "diffusers", "mlx", "fluxion"])
def test_to_every_format_and_back(style: Path, tmp_path: Path, form: str) -> None:
    done("convert", style, tmp_path / form, "--to", form)
    assert weights.read_adapter(tmp_path / form).format == form
    done("convert", tmp_path / form, tmp_path / "back", "--to", "peft")
    assert_same(style, tmp_path / "back")


@pytest.mark.parametrize("form", ["lycoris", "kohya"])
def test_to_kohyas_and_back(style: Path, tmp_path: Path, form: str) -> None:
    file = tmp_path / "file.safetensors"
    assert "layers in lycoris format" in done("convert", style, file, "--to", form, "--component", "text_encoder")
    assert all(name.startswith("lora_te_encoder_layer_") for name in weights.open(file))
    done("convert", file, tmp_path / "back", "--base", MINILM)
    assert_same(style, tmp_path / "back")


def test_the_format_follows_the_destination_and_what_it_holds(style: Path, tmp_path: Path) -> None:
    for source, to, form in (
        (style, "folder", "peft"),
        (style, "file.safetensors", "fluxion"),
        (two_methods(tmp_path / "two"), "mixed", "fluxion"),
    ):
        done("convert", source, tmp_path / to)
        assert weights.read_adapter(tmp_path / to).format == form


def test_what_a_format_cannot_hold_is_said(tmp_path: Path, style: Path) -> None:
    own = two_methods(tmp_path / "two")
    assert "'norm', which is none of lora and dora" in refused("convert", own, tmp_path / "out", "--to", "mlx")
    assert "does not end in .safetensors" in refused("convert", style, tmp_path / "out", "--to", "lycoris")
    assert not (tmp_path / "out").exists()


def test_types(style: Path, tmp_path: Path) -> None:
    done("convert", style, tmp_path / "half", "--dtype", "bfloat16")
    source, half = weights.read_adapter(style), weights.read_adapter(tmp_path / "half")
    for name, layer in source.layers.items():
        for key, tensor in layer.tensors.items():
            assert torch.equal(half.layers[name].tensors[key], tensor.bfloat16())
    large = {"rank": 1, "alpha": 1.0, "dropout": 0.0, "rslora": False}
    layer = weights.LayerWeights("lora", large, {"lora_A": torch.full((1, 2), 1e5), "lora_B": torch.ones(2, 1)})
    weights.write_adapter(weights.AdapterFile({"fc": layer}), tmp_path / "large")
    assert "too large for torch.float16" in refused("convert", tmp_path / "large", tmp_path / "x", "--dtype", "float16")
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_over(style: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    (tmp_path / "mine.safetensors").write_text("mine")
    for name in ("mine", "mine.safetensors"):
        assert "is there already" in refused("convert", style, tmp_path / name)
    assert contents(tmp_path) == {"mine/notes.txt": b"mine", "mine.safetensors": b"mine"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A pipeline as diffusers saves it, and a file of kohya's kind for two of its models."""
    folder = tmp_path_factory.mktemp("pipe")
    pipe = pipeline().pipe
    pipe.save_pretrained(folder / "pipe")
    patch = adapters.inject(
        pipe, adapters.LoRA(rank=2), targets=["to_q", "q_proj", "to_out.0"], exclude="vae.**", seed=0
    )
    for number, parameter in enumerate(patch.parameters()):
        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(number))
    patch.save_pretrained(folder / "kohya.safetensors", format="lycoris")
    patch.save_pretrained(folder / "diffusers", format="diffusers")
    return folder / "pipe", folder / "kohya.safetensors"


def test_a_file_for_a_pipeline(pipe: tuple[Path, Path], tmp_path: Path) -> None:
    base, file = pipe
    done("convert", file, tmp_path / "out", "--to", "diffusers", "--base", base)
    adapter = weights.read_adapter(tmp_path / "out")
    assert adapter.components == ("text_encoder", "unet")
    loaded, expected = pipeline(), pipeline()
    adapters.load(loaded.pipe, tmp_path / "out")
    adapters.load(expected.pipe, file)
    assert all(map(torch.equal, loaded(), expected()))
    loaded = pipeline()
    loaded.pipe.load_lora_weights(tmp_path / "out")
    assert all(map(torch.allclose, loaded(), expected()))


def test_one_model_of_it(pipe: tuple[Path, Path], tmp_path: Path) -> None:
    base, file = pipe
    line = refused("convert", file, tmp_path / "out", "--base", base / "unet")
    assert "choose one out of text_encoder, unet" in line
    done("convert", file, tmp_path / "out", "--base", base / "unet", "--component", "unet")
    adapter = weights.read_adapter(tmp_path / "out")
    assert adapter.format == "peft"
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q" in adapter.layers
    assert "nothing for 'vae'" in refused("convert", file, tmp_path / "x", "--component", "vae", "--base", base)
    done("convert", tmp_path / "out", tmp_path / "pipe.safetensors", "--to", "diffusers", "--component", "unet")
    assert weights.read_adapter(tmp_path / "pipe.safetensors").components == ("unet",)


def test_names_of_an_original_model_in_parts(tmp_path: Path) -> None:
    """One layer of Flux is three in diffusers; only names and shapes of the checkpoint are there."""
    block = "transformer_blocks.0.attn"
    flux = FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=4, joint_attention_dim=8,
        pooled_projection_dim=8, in_channels=4, axes_dims_rope=(2, 2, 0),
    )  # fmt: skip
    flux.save_pretrained(tmp_path / "pipe" / "transformer")
    down, up = torch.randn(2, 8), torch.randn(24, 2)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    weights.save({f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}, tmp_path / "x.safetensors")
    done("convert", tmp_path / "x.safetensors", tmp_path / "out", "--to", "diffusers", "--base", tmp_path / "pipe")
    adapter = weights.read_adapter(tmp_path / "out")
    assert list(adapter.layers) == [f"transformer.{block}.{name}" for name in ("to_k", "to_q", "to_v")]
    for name, part in zip(("to_q", "to_k", "to_v"), up.split(8), strict=True):
        assert torch.equal(adapter.layers[f"transformer.{block}.{name}"].tensors["lora_B"], part)


def test_from_the_hub_with_a_base_there(hub: HubServer, small: Path, tmp_path: Path) -> None:
    serve(hub, "someone/kohya", small / "style.safetensors")
    serve(hub, "someone/model", small / "model")
    done("convert", "someone/kohya", tmp_path / "out", "--base", "someone/model")
    assert_same(small / "style", tmp_path / "out")
    assert weights.read_adapter(tmp_path / "out").base_model == "someone/model"
    assert not any("someone--model" in str(path) and path.suffix == ".safetensors" for path in tmp_path.rglob("*"))


def test_layers_that_have_numbers_need_their_model(tmp_path: Path) -> None:
    tensors = {"unet:0:up": torch.ones(4, 2), "unet:0:down": torch.ones(2, 4)}
    file = weights.save(tensors, tmp_path / "x.safetensors", {"unet": '["CrossAttention"]'})
    for base in ([], ["--base", MINILM]):
        assert "which only its model resolves" in refused("convert", file, tmp_path / "out", *base)


def test_what_is_no_adapter(tmp_path: Path) -> None:
    assert "no adapter in a known format" in refused("convert", MINILM, tmp_path / "out")
    assert "no such file" in refused("convert", tmp_path / "x.safetensors", tmp_path / "out")
    assert fluxion("convert", MINILM, tmp_path / "out", "--to", "gguf").exit_code == 2


def test_flattened_names_are_never_written_as_if_they_were_not(kohya: Path, tmp_path: Path) -> None:
    adapter = replace(weights.read_adapter(kohya), metadata={})
    with pytest.raises(weights.FileFormatError, match="flattened"):
        weights.write_adapter(adapter, tmp_path / "out", "fluxion")
    assert not (tmp_path / "out").exists()


def test_a_pickle_on_request(style: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    old.mkdir()
    (old / "adapter_config.json").write_bytes((style / "adapter_config.json").read_bytes())
    torch.save(dict(weights.open(style)), old / "adapter_model.bin")
    assert "pickle=True" in refused("convert", old, tmp_path / "out")
    done("convert", old, tmp_path / "out", "--pickle")
    assert_same(style, tmp_path / "out")


@pytest.mark.parametrize("name", ["out.gguf", "out.bin", "adapter_config.json"])
def test_a_destination_that_is_called_like_another_file(style: Path, tmp_path: Path, name: str) -> None:
    assert "only .safetensors are written" in refused("convert", style, tmp_path / name)
    assert not (tmp_path / name).exists()


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz])
def test_numbers_of_eight_bits_become_others(tmp_path: Path, kind: torch.dtype) -> None:
    tensors = {"lora_A": torch.ones(2, 4).to(kind), "lora_B": torch.ones(4, 2).to(kind)}
    layers = {"fc": weights.LayerWeights("lora", {"rank": 2, "alpha": 2.0}, tensors)}
    weights.write_adapter(weights.AdapterFile(layers), tmp_path / "eight")
    done("convert", tmp_path / "eight", tmp_path / "out", "--dtype", "float16")
    (layer,) = weights.read_adapter(tmp_path / "out").layers.values()
    assert torch.equal(layer.tensors["lora_A"], torch.ones(2, 4, dtype=torch.float16))
