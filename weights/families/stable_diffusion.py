"""Stable Diffusion 1, 2 and XL: the U-Nets of Stability AI."""

from __future__ import annotations

from weights.families.core.family import Family
from weights.families.core.table import Table, same, under

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
    """Blocks that are numbered in order, where diffusers has levels of two, and a layer that halves the size."""
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
    """Blocks on the way up, where there are levels of three; the last block of each may also double the size."""
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

FAMILY = Family(tables=(UNET, CLASSES), classes={"CrossAttention": ("Attention",)})
