"""The names of original models against diffusers: base checkpoints that its own converters have converted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    ChromaTransformer2DModel,
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders import lora_conversion_utils as lora_converters
from diffusers.loaders import single_file_utils as converters
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import weights
from adapters.files.resolve.path_index import model_index
from adapters.files.resolve.resolved import resolve
from weights.families import Part, translate
from weights.families.aura_flow import AURA_FLOW
from weights.families.chroma import CHROMA
from weights.families.core.table import Table
from weights.families.flux import FLUX
from weights.families.flux_2 import FLUX_2
from weights.families.hunyuan_video import HUNYUAN_VIDEO
from weights.families.ltx_video import LTX_VIDEO
from weights.families.lumina_2 import LUMINA_2
from weights.families.open_clip import OPEN_CLIP
from weights.families.stable_diffusion import CLASSES, UNET
from weights.families.stable_diffusion_3 import LAST_OF_SD_3, SD_3
from weights.families.wan import WAN
from weights.families.z_image import Z_IMAGE

Checkpoint = dict[str, Tensor]


@dataclass
class Family:
    """A model of diffusers, what diffusers converts, and what is known of it here.

    Attributes:
        model: Makes the model. The converters take some sizes for granted, so it may be as wide as the real one.
        tables: The names of its layers in the original.
        convert: What diffusers does with a checkpoint of the original.
        unnamed: Patterns of the layers that have no other name in the original.
        more: Tensors that the converter asks for besides, which are of no layer.
    """

    model: Callable[[], nn.Module]
    tables: tuple[Table, ...]
    convert: Callable[[Checkpoint, nn.Module], Mapping[str, Tensor]]
    unnamed: tuple[str, ...] = ()
    more: tuple[str, ...] = ()


def unet(**options: Any) -> Callable[[], nn.Module]:
    return lambda: UNet2DConditionModel(norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4, **options)


def convert_unet(checkpoint: Checkpoint, model: nn.Module) -> Mapping[str, Tensor]:
    whole = {f"model.diffusion_model.{key}": tensor for key, tensor in checkpoint.items()}
    return converters.convert_ldm_unet_checkpoint(whole, dict(model.config))


def convert_open_clip(checkpoint: Checkpoint, model: nn.Module) -> Mapping[str, Tensor]:
    packed = {
        key.replace("in_proj.", "in_proj_").replace("positional_embedding.weight", "positional_embedding"): tensor
        for key, tensor in checkpoint.items()
    }
    return converters.convert_open_clip_checkpoint(model, packed, prefix="")


def alone(convert: Callable[..., Mapping[str, Tensor]]) -> Callable[[Checkpoint, nn.Module], Mapping[str, Tensor]]:
    return lambda checkpoint, model: convert(checkpoint)


CLIP = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 10}
FAMILIES: dict[str, Family] = {
    "Flux": Family(
        lambda: FluxTransformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True),
        (FLUX,),
        alone(converters.convert_flux_transformer_checkpoint_to_diffusers),
    ),
    "Chroma": Family(
        lambda: ChromaTransformer2DModel(num_layers=1, num_single_layers=1, approximator_layers=2),
        (FLUX, CHROMA),
        alone(converters.convert_chroma_transformer_checkpoint_to_diffusers),
        unnamed=("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"),
    ),
    "Flux 2": Family(
        lambda: Flux2Transformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True),
        (FLUX_2,),
        alone(converters.convert_flux2_transformer_checkpoint_to_diffusers),
    ),
    "HunyuanVideo": Family(
        lambda: HunyuanVideoTransformer3DModel(
            num_layers=1, num_single_layers=1, num_refiner_layers=1, guidance_embeds=True
        ),
        (HUNYUAN_VIDEO,),
        alone(converters.convert_hunyuan_video_transformer_to_diffusers),
    ),
    "SD 1": Family(
        unet(
            block_out_channels=(8, 16, 24, 32),
            down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
            up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        ),
        (UNET,),
        convert_unet,
    ),
    "SDXL": Family(
        unet(
            block_out_channels=(8, 16, 24),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 3),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=56,
        ),
        (UNET,),
        convert_unet,
    ),
    "SD 2 with classes": Family(
        unet(
            block_out_channels=(8, 16),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            class_embed_type="projection",
            projection_class_embeddings_input_dim=56,
        ),
        (UNET, CLASSES),
        convert_unet,
    ),
    "SD 3": Family(
        lambda: SD3Transformer2DModel(
            num_layers=3,
            num_attention_heads=2,
            attention_head_dim=4,
            joint_attention_dim=8,
            caption_projection_dim=8,
            pooled_projection_dim=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
        (SD_3, LAST_OF_SD_3),
        alone(converters.convert_sd3_transformer_checkpoint_to_diffusers),
        unnamed=("context_embedder",),
        more=("pos_embed",),
    ),
    "Wan": Family(
        lambda: WanTransformer3DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            ffn_dim=8,
            text_dim=8,
            image_dim=8,
            added_kv_proj_dim=24,
            freq_dim=8,
        ),
        (WAN,),
        alone(converters.convert_wan_transformer_to_diffusers),
        unnamed=("patch_embedding",),
    ),
    "Wan VACE": Family(
        lambda: WanVACETransformer3DModel(
            num_layers=2,
            num_attention_heads=2,
            attention_head_dim=12,
            ffn_dim=8,
            text_dim=8,
            freq_dim=8,
            vace_layers=[0, 1],
        ),
        (WAN,),
        alone(converters.convert_wan_transformer_to_diffusers),
        unnamed=("patch_embedding", "vace_patch_embedding"),
    ),
    "AuraFlow": Family(
        lambda: AuraFlowTransformer2DModel(
            num_mmdit_layers=2,
            num_single_dit_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            joint_attention_dim=8,
            caption_projection_dim=8,
        ),
        (AURA_FLOW,),
        alone(converters.convert_auraflow_transformer_checkpoint_to_diffusers),
        unnamed=("register_tokens", "pos_embed.pos_embed"),
        more=("positional_encoding",),
    ),
    "Lumina 2": Family(
        lambda: Lumina2Transformer2DModel(num_layers=2, num_refiner_layers=2),
        (LUMINA_2,),
        alone(converters.convert_lumina2_to_diffusers),
        unnamed=("x_embedder",),
    ),
    "LTX": Family(
        lambda: LTXVideoTransformer3DModel(
            num_layers=2, num_attention_heads=2, attention_head_dim=4, cross_attention_dim=8, caption_channels=8
        ),
        (LTX_VIDEO,),
        alone(converters.convert_ltx_transformer_checkpoint_to_diffusers),
        unnamed=("*scale_shift_table", "caption_projection.*", "proj_out", "*.to_[qkv]", "*.to_out.0", "*.net.*"),
    ),
    "Z-Image": Family(
        lambda: ZImageTransformer2DModel(
            n_layers=2, n_refiner_layers=2, dim=24, n_heads=2, n_kv_heads=2, axes_dims=[4, 4, 4]
        ),
        (Z_IMAGE,),
        alone(converters.convert_z_image_transformer_checkpoint_to_diffusers),
        unnamed=(
            "*_pad_token",
            "t_embedder.*",
            "cap_embedder.*",
            "*.feed_forward.*",
            "*_norm[12]",
            "*.adaLN_modulation.0",
        ),
    ),
    "OpenCLIP": Family(
        lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP, projection_dim=8)),
        (OPEN_CLIP,),
        convert_open_clip,
        unnamed=("text_projection",),
    ),
}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


def test_base_checkpoints_go_where_diffusers_puts_them(family: Family) -> None:
    with torch.device("meta"):
        model = family.model()
    rows = {name.removesuffix(".weight"): len(parameter) for name, parameter in model.named_parameters()}
    checkpoint: Checkpoint = {name: torch.empty(1) for name in family.more}
    ours: Checkpoint = {}
    for name in names_in(family.tables):
        for parameter in (name, f"{name}.bias"):
            parts = meaning(parameter, rows)
            sizes = [rows[part.path] // part.blocks * (part.block > 0) for part in parts]
            if parts:
                tensor = torch.rand(sum(sizes), *[1] * (parameter == name))
                checkpoint[parameter if parameter.endswith((".bias", ".scale", "modulation")) else f"{name}.weight"] = (
                    tensor
                )
                ours |= placed(tensor, parts, sizes)
    named = {path for path in rows if any(fnmatch(path.removesuffix(".bias"), pattern) for pattern in family.unnamed)}
    checkpoint |= {path if path.endswith(".bias") else f"{path}.weight": torch.empty(1) for path in named}

    theirs = {key.removesuffix(".weight"): tensor for key, tensor in family.convert(checkpoint, model).items()}

    for path, tensor in ours.items():
        assert torch.equal(theirs[path].flatten(), tensor.flatten()), path
    assert sorted(rows.keys() - ours.keys() - named) == [], "what no entry reaches"


def names_in(tables: Iterable[Table], blocks: int = 4) -> Iterator[str]:
    """The names in tables with small numbers, without those of single formats."""
    templates = {template: None for table in tables for template in table}
    for template in templates:
        as_in_files = "processor" in template or template.endswith(("in_proj_weight", "in_proj_bias"))
        if not as_in_files and f"{template}.scale" not in templates:
            for number in range(blocks if "{i}" in template else 1):
                yield template.replace("{i}", str(number))


def meaning(name: str, rows: Mapping[str, int]) -> tuple[Part, ...]:
    """The parts of a layer that a model has."""
    alternatives = translate(name, flattened=False)
    assert translate(name.replace(".", "_"), flattened=True) == alternatives
    return next((parts for parts in alternatives if all(part.path in rows for part in parts)), ())


def placed(tensor: Tensor, parts: Sequence[Part], sizes: Sequence[int]) -> Checkpoint:
    """The tensors of layers by the paths of these, from one that holds the parts."""
    pieces: dict[str, dict[int, Tensor]] = {}
    for part, piece in zip(parts, tensor.split(sizes), strict=True):
        if part.block:
            pieces.setdefault(part.path, {})[part.block] = piece
    return {path: torch.cat([piece for _, piece in sorted(of.items())]) for path, of in pieces.items()}


def test_text_encoders_of_transformers_have_a_level_more_or_less() -> None:
    config = CLIPTextConfig(**CLIP, projection_dim=8)
    with torch.device("meta"):
        plain, projected = CLIPTextModel(config), CLIPTextModelWithProjection(config)
    inner, outer = (
        {name.removesuffix(".weight") for name, _ in model.named_parameters()} for model in (plain, projected)
    )
    for name in inner:
        assert (Part(f"text_model.{name}"),) in translate(name, flattened=False)
        assert (Part(name),) in translate(f"text_model.{name}", flattened=False)
    assert outer == {f"text_model.{name}" for name in inner} | {"text_projection"}


# Files of LoRA


@dataclass
class Kind:
    """Files of one kind, and what diffusers makes of them.

    Attributes:
        family: The model that they are for, of which only the names and the sizes of layers count.
        names: The names of the layers that it may have.
        key: The name of a tensor, with those of a layer and of A or B.
        convert: What diffusers does with the tensors, which it may change.
        alpha: That of the layers, if they have one.
    """

    family: str
    names: Iterable[str]
    key: Callable[[str, str], str]
    convert: Callable[[Checkpoint], Mapping[str, Tensor]]
    alpha: float | None = None


def dotted(template: str, *ends: str) -> Callable[[str, str], str]:
    return lambda name, end: template.format(name, dict(zip(("A", "B"), ends, strict=True))[end])


def flattened(name: str, end: str) -> str:
    ends = {"A": "lora_down.weight", "B": "lora_up.weight"}
    return f"lora_unet_{name.replace('.', '_')}.{ends.get(end, end)}"


def convert_bfl(state: Checkpoint) -> Mapping[str, Tensor]:
    """In the last layer, diffusers swaps the halves of A as well as those of B, and A has no outputs in it."""
    tensors = lora_converters._convert_bfl_flux_control_lora_to_diffusers(state)
    key = "transformer.norm_out.linear.lora_A.weight"
    return {**tensors, key: tensors[key].roll(len(tensors[key]) // 2, 0)}


def convert_sdxl(state: Checkpoint) -> Mapping[str, Tensor]:
    config = SimpleNamespace(layers_per_block=2)
    tensors, alphas = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=config)
    assert {*alphas.values()} == {3.0}
    converted = convert_unet_state_dict_to_peft(tensors)
    return {key: tensor * 3 / tensor.shape[1] if "lora_B" in key else tensor for key, tensor in converted.items()}


LAYERS_OF_FLUX = [name for name in names_in([FLUX], blocks=2) if not name.endswith(".scale")]
KINDS: dict[str, Kind] = {
    "kohya's for Flux": Kind(
        "Flux", LAYERS_OF_FLUX, flattened, lora_converters._convert_kohya_flux_lora_to_diffusers, alpha=3
    ),
    "BFL's for Flux": Kind(
        "whole Flux",
        [*names_in([FLUX], blocks=38)],
        dotted("{}.{}", "lora_A.weight", "lora_B.weight"),
        convert_bfl,
    ),
    "XLabs' for Flux": Kind(
        "Flux",
        [name.replace("{i}", number) for name in FLUX if "processor" in name for number in "01"],
        dotted("{}.{}", "down.weight", "up.weight"),
        lora_converters._convert_xlabs_flux_lora_to_diffusers,
    ),
    "kohya's for SDXL": Kind(
        "SDXL",
        [name for name in names_in([UNET]) if not name.endswith(".1.conv")],
        flattened,
        convert_sdxl,
        alpha=3,
    ),
    "ComfyUI's for Wan": Kind(
        "Wan",
        [*names_in([WAN])],
        dotted("diffusion_model.{}.{}", "lora_A.weight", "lora_B.weight"),
        lora_converters._convert_non_diffusers_wan_lora_to_diffusers,
    ),
    "musubi's for Wan": Kind(
        "Wan",
        [name for name in names_in([WAN]) if name.startswith("blocks.")],
        flattened,
        lora_converters._convert_musubi_wan_lora_to_diffusers,
        alpha=3,
    ),
}


@pytest.mark.parametrize("apart", [False, True], ids=["together", "apart"])
@pytest.mark.parametrize("kind", KINDS)
def test_files_have_the_layers_that_they_have_in_diffusers(tmp_path: Path, kind: str, apart: bool) -> None:
    """Also those whose parts of a fused layer were trained apart, so that B has blocks and is 0 between them."""
    case = KINDS[kind]
    with torch.device("meta"):
        model = (
            FAMILIES[case.family].model() if case.family in FAMILIES else FluxTransformer2DModel(guidance_embeds=True)
        )
    weighty = {name.removesuffix(".weight"): tensor for name, tensor in model.named_parameters() if "weight" in name}
    rows = {path: len(weight) for path, weight in weighty.items() if weight.ndim > 1}
    tensors: Checkpoint = {}
    for name in case.names:
        parts = meaning(name, rows)
        if parts:
            ups = [torch.randn(rows[part.path] // part.blocks, 2) for part in parts]
            up = torch.block_diag(*ups) if apart else torch.cat(ups)
            tensors |= {case.key(name, "A"): torch.randn(up.shape[1], 3), case.key(name, "B"): up}
            if case.alpha is not None:  # That of the final layer is lost in diffusers.
                alpha = up.shape[1] if name.startswith("final_layer") else case.alpha
                tensors[case.key(name, "alpha")] = torch.tensor(float(alpha))
        elif name.endswith(".scale") and meaning(name, dict.fromkeys(weighty, 4)):
            tensors[name] = torch.randn(4)
    path = weights.save(tensors, tmp_path / "file.safetensors")

    adapter = weights.read_adapter(path)
    resolved = resolve(model_index(model), adapter)
    theirs = case.convert(tensors)

    assert resolved.mismatches == []
    ours = {layer.weight.path: layer.content for layer in resolved.layers}
    seen = set()
    for key, a in theirs.items():
        name = key.removeprefix("transformer.").removeprefix("unet.").split(".lora_")[0]
        if "lora_A" in key:
            layer = ours[name]
            b = theirs[key.replace("lora_A", "lora_B")]
            torch.testing.assert_close(update(layer), b @ a, rtol=1e-5, atol=1e-5)
            assert layer.hyperparameters["rank"] <= len(a)
        elif "lora_B" not in key:
            layer = ours[name.removesuffix(".weight")]
            assert torch.equal(layer.tensors["weight"], a)
        seen.add(id(layer))
    assert seen == {*map(id, ours.values())}


def update(layer: weights.LayerWeights) -> Tensor:
    rank, alpha = layer.hyperparameters["rank"], layer.hyperparameters["alpha"]
    return layer.tensors["lora_B"] @ layer.tensors["lora_A"] * (alpha / rank)
