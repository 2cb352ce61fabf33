"""The names of original models."""

from __future__ import annotations

import pytest

from weights.families import Part, translate
from weights.families.core.family import families


@pytest.mark.parametrize(
    ("name", "paths"),
    [
        ("double_blocks.10.img_attn.qkv", "transformer_blocks.10.attn.to_{q,k,v}"),
        ("single_blocks.3.modulation.lin", "single_transformer_blocks.3.norm.linear"),
        ("single_blocks.3.processor.qkv_lora", "single_transformer_blocks.3.attn.to_{q,k,v}"),
        (
            "input_blocks.8.1.transformer_blocks.9.attn2.to_out.0",
            "down_blocks.2.attentions.1.transformer_blocks.9.attn2.to_out.0",
        ),
        ("output_blocks.5.2.conv", "up_blocks.1.upsamplers.0.conv"),
        ("blocks.39.cross_attn.k_img", "blocks.39.attn2.add_k_proj"),
        ("text_model.encoder.layers.11.mlp.fc1", "encoder.layers.11.mlp.fc1"),
    ],
)
def test_a_layer_and_its_bias_by_dotted_and_flattened_names(name: str, paths: str) -> None:
    parts = [paths.replace("{q,k,v}", letter) for letter in ("qkv" if "{" in paths else "q")]
    for end in ("", ".bias"):
        expected = [tuple(Part(path + end) for path in parts)]
        assert translate(name + end, flattened=False) == expected
        assert translate((name + end).replace(".", "_"), flattened=True) == expected
    assert translate(f"_{name}".replace(".", "_"), flattened=True) == [tuple(map(Part, parts))]


@pytest.mark.parametrize(
    "name",
    [
        "",
        "bias",
        ".bias",
        "double_blocks",
        "double_blocks.x.img_attn.qkv",
        "input_blocks.12.0.op",
        "a" * 10_000,
        "1." * 5_000,
    ],
)
def test_a_name_of_no_layer_means_nothing(name: str) -> None:
    assert translate(name, flattened=False) == translate(name, flattened=True) == []


def test_blocks_of_rows_in_another_order() -> None:
    (first, *_) = translate("final_layer.adaLN_modulation.1", flattened=False)
    assert first == (Part("norm_out.linear", 2, 2), Part("norm_out.linear", 1, 2))


def test_a_name_may_mean_layers_of_several_models() -> None:
    found = translate("layers_0_attention_out", flattened=True)
    assert found == [(Part("layers.0.attn.to_out.0"),), (Part("layers.0.attention.to_out.0"),)]


def test_the_blocks_of_every_layer_that_is_cut_are_all_there() -> None:
    for table in (table for family in families() for table in family.tables):
        for source in table:
            for parts in translate(source.replace("{i}", "0"), flattened=False):
                blocks: dict[str, list[int]] = {}
                for part in parts:
                    blocks.setdefault(part.path, []).append(part.block)
                counts = {part.path: part.blocks for part in parts}
                assert all(sorted(of) in ([*range(1, counts[path] + 1)], [0]) for path, of in blocks.items()), source
