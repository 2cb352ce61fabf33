"""Models of Stability AI: the U-Nets of Stable Diffusion 1, 2 and XL, and the transformer of Stable Diffusion 3."""

from __future__ import annotations

from weights.families.table import Table, same, under

_RESNET: Table = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_TRANSFORMER: Table = {
    **same("norm", "proj_in", "proj_out"),
    **under(
        "transformer_blocks.{i}",
        "transformer_blocks.{i}",
        same(
            *(f"attn{number}.{name}" for number in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
            *("ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"),
        ),
    ),
}


def _down() -> Table:
    """Blocks that are numbered in order, where there are levels of two here, and a layer that halves the size."""
    table: dict[str, str | tuple[str, ...]] = {}
    for block in range(11):
        level, place = divmod(block, 3)
        source, target = f"input_blocks.{block + 1}", f"down_blocks.{level}"
        if place == 2:
            table[f"{source}.0.op"] = f"{target}.downsamplers.0.conv"
        else:
            table |= under(f"{source}.0", f"{target}.resnets.{place}", _RESNET)
            table |= under(f"{source}.1", f"{target}.attentions.{place}", _TRANSFORMER)
    return table


def _up() -> Table:
    """The same on the way up, where there are levels of three; the last block of each may also double the size."""
    table: dict[str, str | tuple[str, ...]] = {}
    for block in range(12):
        level, place = divmod(block, 3)
        source, target = f"output_blocks.{block}", f"up_blocks.{level}"
        table |= under(f"{source}.0", f"{target}.resnets.{place}", _RESNET)
        table |= under(f"{source}.1", f"{target}.attentions.{place}", _TRANSFORMER)
        if place == 2:  # After an attention, or without one.
            table |= {f"{source}.{number}.conv": f"{target}.upsamplers.0.conv" for number in (1, 2)}
    return table


UNET: Table = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    **under("middle_block.0", "mid_block.resnets.0", _RESNET),
    **under("middle_block.1", "mid_block.attentions.0", _TRANSFORMER),
    **under("middle_block.2", "mid_block.resnets.1", _RESNET),
    **_down(),
    **_up(),
}

CLASSES: Table = {
    "label_emb.0.0": "class_embedding.linear_1",
    "label_emb.0.2": "class_embedding.linear_2",
}

_STEPS: Table = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
_ATTENTION: Table = {"qkv": ("to_q", "to_k", "to_v"), "proj": "to_out.0", "ln_q": "norm_q", "ln_k": "norm_k"}

SD_3: Table = {
    "x_embedder.proj": "pos_embed.proj",
    **under("t_embedder", "time_text_embed.timestep_embedder", _STEPS),
    **under("y_embedder", "time_text_embed.text_embedder", _STEPS),
    **under(
        "joint_blocks.{i}.x_block",
        "transformer_blocks.{i}",
        {
            **under("attn", "attn", _ATTENTION),
            **under("attn2", "attn2", _ATTENTION),
            "adaLN_modulation.1": "norm1.linear",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
        },
    ),
    **under(
        "joint_blocks.{i}.context_block",
        "transformer_blocks.{i}",
        {
            "attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "attn.proj": "attn.to_add_out",
            "attn.ln_q": "attn.norm_added_q",
            "attn.ln_k": "attn.norm_added_k",
            "adaLN_modulation.1": ("norm1_context.linear", "attn.to_add_out[0/1]"),
            "mlp.fc1": "ff_context.net.0.proj",
            "mlp.fc2": "ff_context.net.2",
        },
    ),
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": ("norm_out.linear[2/2]", "norm_out.linear[1/2]"),
}

LAST_OF_SD_3: Table = {
    "joint_blocks.{i}.context_block.adaLN_modulation.1": (
        "transformer_blocks.{i}.norm1_context.linear[2/2]",
        "transformer_blocks.{i}.norm1_context.linear[1/2]",
    )
}
"""The last block has no output for the text, and modulates it as the final layer does the image."""

TABLES = (UNET, CLASSES, SD_3, LAST_OF_SD_3)
