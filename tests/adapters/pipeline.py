"""Real pipelines of diffusers, small enough to build offline in an instant."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor

_UNET = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
}
_UNET_XL = {
    "block_out_channels": (32, 32, 64),
    "layers_per_block": 2,
    "sample_size": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 48,
    "attention_head_dim": (4, 4, 8),
    "norm_num_groups": 8,
    "transformer_layers_per_block": (1, 2, 3),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
    "use_linear_projection": True,
}
_CLIP = {
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
}


@dataclass
class Pipeline:
    """A pipeline of Stable Diffusion, which is called for the outputs of its UNet and its text encoders."""

    pipe: Any
    width: int
    added: dict[str, Tensor] | None = None

    def __call__(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, h = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, self.width, generator=generator)
        tokens = torch.tensor([[0, 5, 6, 2]])
        with torch.no_grad():
            image = self.pipe.unet(x, 3, h, added_cond_kwargs=self.added).sample
            texts = [self.pipe.text_encoder(tokens).last_hidden_state]
            if self.added:
                texts.append(self.pipe.text_encoder_2(tokens).text_embeds)
        return [image, *texts]


def _clip(kind: Any, width: int, **options: int) -> transformers.PreTrainedModel:
    return kind(transformers.CLIPTextConfig(hidden_size=width, **_CLIP, **options)).eval()


def _common() -> dict[str, Any]:
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=8).eval()
    return {"vae": vae, "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False), "tokenizer": None}


def pipeline() -> Pipeline:
    """One of Stable Diffusion, the same each time."""
    torch.default_generator.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**_UNET).eval()
    parts = {"unet": unet, "text_encoder": _clip(transformers.CLIPTextModel, 32), **_common()}
    none = dict.fromkeys(("safety_checker", "feature_extractor"))
    return Pipeline(diffusers.StableDiffusionPipeline(**parts, **none, requires_safety_checker=False), 32)


def pipeline_xl() -> Pipeline:
    """One of Stable Diffusion XL, the same each time."""
    torch.default_generator.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**_UNET_XL).eval()
    second = _clip(transformers.CLIPTextModelWithProjection, 32, projection_dim=32)
    parts = {"unet": unet, "text_encoder": _clip(transformers.CLIPTextModel, 16), "text_encoder_2": second}
    pipe = diffusers.StableDiffusionXLPipeline(**parts, **_common(), tokenizer_2=None)
    return Pipeline(pipe, 48, {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)})
