"""Files with the names of original models, loaded into models of diffusers and transformers."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, WanTransformer3DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import adapters
import weights
from adapters import LayerMismatchError
from tests.adapters.models import snapshot


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, num_attention_heads=2, attention_head_dim=4, joint_attention_dim=8,
        pooled_projection_dim=8, in_channels=4, axes_dims_rope=(2, 2, 0),
    )  # fmt: skip


CLIP = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10}


def file(path: Path, tensors: dict[str, Tensor]) -> Path:
    return weights.save(tensors, path / "file.safetensors")


def kohya(stem: str, outputs: int, inputs: int = 8) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer, and what they add to its weight."""
    down, up = torch.randn(4, inputs), torch.randn(outputs, 4)
    return {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(2.0)}, (
        up @ down / 2
    )


def assert_adds(model: nn.Module, path: Path, expected: dict[str, Tensor]) -> None:
    """A file changes these weights in this way, and no others."""
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    patch = adapters.load(model, path)
    assert {*patch.targets} == {*expected}
    patch.merge_and_eject()
    for name, value in model.named_parameters():
        change = expected.get(name.removesuffix(".weight"), torch.zeros_like(value))
        torch.testing.assert_close(value, before[name] + change, rtol=1e-5, atol=1e-5)


def test_a_fused_layer_is_loaded_in_its_parts(tmp_path: Path) -> None:
    qkv, change = kohya("lora_unet_double_blocks_0_img_attn_qkv", 24)
    linear, other = kohya("lora_unet_single_blocks_0_linear1", 56)
    final, swapped = kohya("lora_unet_final_layer_adaLN_modulation_1", 16)
    block, single = "transformer_blocks.0", "single_transformer_blocks.0"
    q, k, v, mlp = other.split([8, 8, 8, 32])
    expected = {f"{block}.attn.to_{letter}": part for letter, part in zip("qkv", change.split(8), strict=True)}
    expected |= {f"{single}.attn.to_q": q, f"{single}.attn.to_k": k, f"{single}.attn.to_v": v}
    expected |= {f"{single}.proj_mlp": mlp, "norm_out.linear": swapped.roll(8, 0)}

    assert_adds(flux(), file(tmp_path, {**qkv, **linear, **final}), expected)


def test_parts_do_not_share_what_is_trained(tmp_path: Path) -> None:
    qkv, _ = kohya("lora_unet_double_blocks_0_img_attn_qkv", 24)
    patch = adapters.load(flux(), file(tmp_path, qkv), trainable=True)
    assert len({parameter.data_ptr() for parameter in patch.parameters()}) == 6


@pytest.mark.parametrize("last", [False, True])
def test_the_last_block_of_sd_3_modulates_the_text_in_another_order(tmp_path: Path, last: bool) -> None:
    model = SD3Transformer2DModel(
        num_layers=2, num_attention_heads=2, attention_head_dim=4, joint_attention_dim=8, caption_projection_dim=8,
        pooled_projection_dim=8, in_channels=4,
    )  # fmt: skip
    stem = f"lora_unet_joint_blocks_{int(last)}_context_block_adaLN_modulation_1"
    tensors, change = kohya(stem, 16 if last else 48)
    expected = {f"transformer_blocks.{int(last)}.norm1_context.linear": change.roll(8, 0) if last else change}
    assert_adds(model, file(tmp_path, tensors), expected)


def test_a_name_that_the_model_has_for_a_layer_without_weight_is_another_layer(tmp_path: Path) -> None:
    model = WanTransformer3DModel(
        num_layers=1, num_attention_heads=2, attention_head_dim=12, ffn_dim=8, text_dim=8, freq_dim=8,
        cross_attn_norm=True,
    )  # fmt: skip
    change = torch.randn(24)
    assert isinstance(model.blocks[0].norm3, nn.Module)
    assert_adds(model, file(tmp_path, {"diffusion_model.blocks.0.norm3.diff": change}), {"blocks.0.norm2": change})


def test_whole_scales_of_norms_have_the_name_of_the_parameter(tmp_path: Path) -> None:
    norm = torch.randn(4)
    lora = {"img_in.lora_A.weight": torch.randn(2, 4), "img_in.lora_B.weight": torch.zeros(8, 2)}
    model = flux()
    patch = adapters.load(model, file(tmp_path, {**lora, "double_blocks.0.txt_attn.norm.key_norm.scale": norm}))
    patch.merge()
    assert torch.equal(model.transformer_blocks[0].attn.norm_added_k.weight, norm)


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_a_text_encoder_with_or_without_the_level(tmp_path: Path, kind: type[nn.Module]) -> None:
    model = kind(CLIPTextConfig(**CLIP, projection_dim=8))
    tensors, change = kohya("lora_te_text_model_encoder_layers_1_self_attn_q_proj", 8)
    level = "" if kind is CLIPTextModel else "text_model."
    assert_adds(model, file(tmp_path, tensors), {f"{level}encoder.layers.1.self_attn.q_proj": change})


def test_several_models_each_with_its_names(tmp_path: Path) -> None:
    models = {"transformer": flux(), "text_encoder": CLIPTextModel(CLIPTextConfig(**CLIP))}
    qkv, _ = kohya("lora_unet_double_blocks_0_txt_attn_qkv", 24)
    text, _ = kohya("lora_te1_text_model_encoder_layers_0_mlp_fc2", 8, 16)
    patch = adapters.load(models, file(tmp_path, {**qkv, **text}))
    attention = "transformer.transformer_blocks.0.attn"
    assert [*patch.targets] == [
        *(f"{attention}.add_{letter}_proj" for letter in "qkv"),
        "text_encoder.encoder.layers.0.mlp.fc2",
    ]


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        (kohya("lora_unet_double_blocks_7_img_attn_qkv", 24)[0], "no layer unet.double_blocks_7_img_attn_qkv"),
        (kohya("lora_unet_double_blocks_0_img_attn_qkv", 25)[0], "has a lora_B (25, 4), not of 24 rows"),
        (
            {"lora_unet_double_blocks_0_img_attn_qkv.oft_blocks": torch.randn(3, 8, 8)},
            "unet.double_blocks_0_img_attn_qkv, which is transformer_blocks.0.attn.to_q and "
            "transformer_blocks.0.attn.to_k and transformer_blocks.0.attn.to_v in the model, has diag-oft",
        ),
        (
            kohya("lora_unet_double_blocks_0_img_attn_qkv", 24)[0]
            | kohya("lora_unet_transformer_blocks_0_attn_to_k", 8)[0],
            "unet.double_blocks_0_img_attn_qkv and unet.transformer_blocks_0_attn_to_k are both for "
            "unet.transformer_blocks_0_attn_to_k",
        ),
    ],
)
def test_what_does_not_fit_is_told_by_its_name_in_the_file(
    tmp_path: Path, tensors: dict[str, Tensor], reason: str
) -> None:
    model = flux()
    before = snapshot(model)
    with pytest.raises(LayerMismatchError, match=re.escape(reason)):
        adapters.load(model, file(tmp_path, tensors))
    assert snapshot(model) == before


def test_a_name_that_the_model_has_is_that_layer(tmp_path: Path) -> None:
    model = nn.ModuleDict({"encoder": nn.Module(), "text_model": nn.ModuleDict({"encoder": nn.Module()})})
    for encoder in (model["encoder"], model["text_model"]["encoder"]):
        encoder.layers = nn.ModuleList([nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(8, 8)})})])
    for name in ("encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1"):
        tensors, change = kohya(f"lora_te_{name.replace('.', '_')}", 8)
        assert_adds(model, file(tmp_path, tensors), {name: change})
