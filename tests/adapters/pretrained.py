"""Real models, of transformers and diffusers, from configurations small enough to build offline in an instant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tests.adapters.models import Case

BATCH = 4  # As in `tests.adapters.models`.
LENGTH = 6  # Of a sequence: neither the batch, nor what a mixture of experts has by chance.
_VOCABULARY = 20
_SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_QUIET = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "attn_implementation": "eager"}


def _tokens(length: int = LENGTH) -> Tensor:
    return torch.randint(3, _VOCABULARY, (BATCH, length))


def _case(name: str, model: nn.Module, inputs: Tensor, run: Callable[[nn.Module, Tensor], Any]) -> Case:
    """A case whose weights are of a size at which every layer matters; such models start with very small ones."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=1 / parameter[0].numel() ** 0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return Case(name, model.eval(), inputs, run)


def _bert() -> Case:
    config = transformers.BertConfig(vocab_size=_VOCABULARY, max_position_embeddings=16, **_SIZES, **_QUIET)
    types = torch.arange(LENGTH).expand(BATCH, -1) % 2
    return _case(
        "bert",
        transformers.BertForSequenceClassification(config),
        _tokens(),
        lambda m, x: m(x, token_type_ids=types).logits,
    )


def _gpt2() -> Case:
    config = transformers.GPT2Config(
        vocab_size=_VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, n_inner=24, **_QUIET
    )
    return _case("gpt2", transformers.GPT2LMHeadModel(config), _tokens(), lambda m, x: m(x).logits)


def _llama() -> Case:
    config = transformers.LlamaConfig(
        vocab_size=_VOCABULARY, num_key_value_heads=1, tie_word_embeddings=True, **_SIZES, **_QUIET
    )
    return _case("llama", transformers.LlamaForCausalLM(config), _tokens(), lambda m, x: m(x).logits)


def _t5() -> Case:
    config = transformers.T5Config(
        vocab_size=_VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        relative_attention_num_buckets=8,
        decoder_start_token_id=0,
        pad_token_id=0,
        feed_forward_proj="gated-gelu",
        attn_implementation="eager",
    )
    answer = _tokens(5)
    return _case(
        "t5",
        transformers.T5ForConditionalGeneration(config),
        _tokens(),
        lambda m, x: m(x, decoder_input_ids=answer).logits,
    )


def _vit() -> Case:
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_channels=3, **_SIZES, **_QUIET)
    return _case(
        "vit",
        transformers.ViTForImageClassification(config),
        torch.randn(BATCH, 3, 8, 8),
        lambda m, x: m(x).logits,
    )


def _clip() -> Case:
    config = transformers.CLIPConfig(
        text_config={"vocab_size": _VOCABULARY, "max_position_embeddings": 8, **_SIZES, **_QUIET},
        vision_config={"image_size": 8, "patch_size": 4, **_SIZES},
        projection_dim=12,
    )
    tokens = _tokens()

    def run(model: nn.Module, x: Tensor) -> Tensor:
        output = model(input_ids=tokens, pixel_values=x)
        return torch.cat([output.text_embeds, output.image_embeds], dim=1)

    return _case("clip", transformers.CLIPModel(config), torch.randn(BATCH, 3, 8, 8), run)


def _whisper() -> Case:
    config = transformers.WhisperConfig(
        vocab_size=_VOCABULARY,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=7,
        max_target_positions=10,
        decoder_start_token_id=1,
        **_QUIET,
    )
    answer = _tokens()
    return _case(
        "whisper",
        transformers.WhisperForConditionalGeneration(config),
        torch.randn(BATCH, 8, 14),
        lambda m, x: m(x, decoder_input_ids=answer).logits,
    )


def _mixtral() -> Case:
    config = transformers.MixtralConfig(
        vocab_size=_VOCABULARY,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=2,
        experts_implementation="eager",  # The others do not compute in double precision.
        **_SIZES,
        **_QUIET,
    )
    return _case("mixtral", transformers.MixtralForCausalLM(config), _tokens(), lambda m, x: m(x).logits)


def _qwen_moe() -> Case:
    config = transformers.Qwen2MoeConfig(
        vocab_size=_VOCABULARY,
        num_key_value_heads=1,
        num_experts=3,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        shared_expert_intermediate_size=12,
        decoder_sparse_step=1,
        experts_implementation="eager",
        **_SIZES,
        **_QUIET,
    )
    return _case("qwen_moe", transformers.Qwen2MoeForCausalLM(config), _tokens(), lambda m, x: m(x).logits)


def _unet() -> Case:
    model = diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=12,
        attention_head_dim=4,
    )
    text, times = torch.randn(BATCH, 5, 12), torch.tensor([1, 50, 300, 900])
    return _case(
        "unet", model, torch.randn(BATCH, 4, 8, 8), lambda m, x: m(x, times, encoder_hidden_states=text.to(x)).sample
    )


def _flux() -> Case:
    model = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=10,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    text, pooled = torch.randn(BATCH, 5, 12), torch.randn(BATCH, 10)
    times, guidance = torch.tensor([0.1, 0.3, 0.7, 0.9]), torch.tensor([1.0, 2.0, 3.0, 4.0])

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model(
            hidden_states=x,
            encoder_hidden_states=text.to(x),
            pooled_projections=pooled.to(x),
            timestep=times.to(x),
            guidance=guidance.to(x),
            img_ids=torch.arange(9)[:, None].expand(-1, 3).to(x),
            txt_ids=torch.zeros(5, 3).to(x),
        ).sample

    return _case("flux", model, torch.randn(BATCH, 9, 4), run)


def _sd3() -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        caption_projection_dim=16,
        pooled_projection_dim=10,
        out_channels=4,
        pos_embed_max_size=8,
    )
    text, pooled, times = torch.randn(BATCH, 5, 12), torch.randn(BATCH, 10), torch.tensor([1, 50, 300, 900])

    def run(model: nn.Module, x: Tensor) -> Tensor:
        return model(
            hidden_states=x, encoder_hidden_states=text.to(x), pooled_projections=pooled.to(x), timestep=times
        ).sample

    return _case("sd3", model, torch.randn(BATCH, 4, 8, 8), run)


def _vae() -> Case:
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "UpDecoderBlock2D"),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=4,
        sample_size=8,
    )

    def run(model: Any, x: Tensor) -> Tensor:
        moments = model.encode(x).latent_dist.parameters
        return torch.cat([moments.flatten(1), model.decode(moments[:, :3]).sample.flatten(1)], dim=1)

    return _case("vae", model, torch.randn(BATCH, 3, 8, 8), run)


BUILDERS: dict[str, Callable[[], Case]] = {
    "bert": _bert,
    "gpt2": _gpt2,
    "llama": _llama,
    "t5": _t5,
    "vit": _vit,
    "clip": _clip,
    "whisper": _whisper,
    "mixtral": _mixtral,
    "qwen_moe": _qwen_moe,
    "unet": _unet,
    "flux": _flux,
    "sd3": _sd3,
    "vae": _vae,
}


def build(name: str, seed: int = 0) -> Case:
    torch.default_generator.manual_seed(seed)
    return BUILDERS[name]()
