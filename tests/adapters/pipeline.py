"""A real pipeline of diffusers, small enough to build offline in an instant."""

from __future__ import annotations

from dataclasses import dataclass

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
_CLIP = {
    "hidden_size": 32,
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
    """A pipeline of Stable Diffusion, which is called for the outputs of its UNet and its text encoder."""

    pipe: diffusers.StableDiffusionPipeline

    def __call__(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(0)
        x, h = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 5, 32, generator=generator)
        with torch.no_grad():
            image = self.pipe.unet(x, 3, h).sample
            text = self.pipe.text_encoder(torch.tensor([[0, 5, 6, 2]])).last_hidden_state
        return [image, text]


def pipeline() -> Pipeline:
    """The same one each time."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**_UNET).eval()
    clip = transformers.CLIPTextModel(transformers.CLIPTextConfig(**_CLIP)).eval()
    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8, sample_size=8).eval()
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    parts = {"unet": unet, "text_encoder": clip, "vae": vae, "scheduler": scheduler}
    none = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    return Pipeline(diffusers.StableDiffusionPipeline(**parts, **none, requires_safety_checker=False))
