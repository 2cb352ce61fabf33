"""The model card: fields, how to load it, and a tree of layers, whatever the names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given
from hypothesis import strategies as st

import weights
from tests.thinned import examples
from weights.hub.card import check_card
from weights.hub.layer_tree import drawn


def layer(method: str = "lora", rank: int = 8) -> weights.LayerWeights:
    return weights.LayerWeights(method, {"rank": rank, "alpha": 16.0}, {"lora_A": torch.ones(rank, 2)})


def fields(card: str) -> dict[str, object]:
    found = re.match(r"---\n(.*?)\n---\n\n", card, re.DOTALL)
    assert found is not None
    return dict(yaml.safe_load(found[1]))


def test_all_that_the_hub_knows() -> None:
    adapter = weights.AdapterFile({"a": layer()}, base_model="someone/base", task="CAUSAL_LM")
    card = weights.model_card(adapter, "peft", repo_id="me/style", license="mit", tags=["style", "peft"])
    assert fields(card) == {
        "base_model": "someone/base",
        "base_model_relation": "adapter",
        "library_name": "fluxion-adapters",
        "license": "mit",
        "pipeline_tag": "text-generation",
        "tags": ["fluxion-adapters", "peft", "lora", "base_model:adapter:someone/base", "style"],
    }
    assert 'adapters.load(model, "me/style")\n' in card
    assert 'PeftModel.from_pretrained(model, "me/style")' in card
    assert "<repo>" not in card
    assert "| lora | 1 | 8 | 16 | 16 |" in card


def test_how_to_load_it_elsewhere_only_where_that_works() -> None:
    adapter = weights.AdapterFile({"unet.a": layer()}, base_model="/home/me/base")
    own, image = (weights.model_card(adapter, format) for format in ("fluxion", "diffusers"))
    assert "PeftModel" not in own + image
    assert "load_lora_weights" not in own
    assert 'pipeline.load_lora_weights("<repo>")' in image
    assert fields(image)["pipeline_tag"] == "text-to-image"
    assert "/home/me" not in own + image
    assert fields(own).keys() == {"library_name", "tags"}


def test_other_licenses_need_a_name() -> None:
    adapter = weights.AdapterFile({"a": layer()})
    with pytest.raises(weights.FileFormatError, match="license_name"):
        weights.model_card(adapter, "peft", license="other")
    card = weights.model_card(adapter, "peft", license="other", license_name="mine", license_link="LICENSE")
    assert fields(card)["license_name"] == "mine"
    for tags in ("style", [1], ["a\nb"], ["\x85"]):
        with pytest.raises(weights.FileFormatError, match="a string in one line"):
            weights.model_card(adapter, "peft", tags=tags)  # type: ignore[arg-type]


def test_layers_that_differ_in_numbers_are_one_line() -> None:
    names = [f"model.layers.{n}.self_attn.{name}" for n in range(32) for name in ("q_proj", "v_proj")]
    names += [f"model.layers.{n}.mlp.up_proj" for n in (0, 1, 2, 5)]
    layers = dict.fromkeys([*names, "lm_head"], "lora rank 16") | {"a.0.1": "ia3", "a.1.0": "ia3"}
    assert drawn(layers).splitlines() == [
        "a.0-1.0-1  ia3, 2 layers",
        "lm_head  lora rank 16",
        "model.layers",
        "├── 0-2,5.mlp.up_proj  lora rank 16",
        "└── 0-31.self_attn",
        "    ├── q_proj  lora rank 16",
        "    └── v_proj  lora rank 16",
    ]
    assert drawn({"": "promptencoder"}) == "the whole model  promptencoder"


def test_a_tree_of_anything_is_small() -> None:
    many = drawn({f"layer_{n:04}": "lora" for n in range(5000)}).splitlines()
    assert len(many) == 40
    assert many[-1] == "… and 4961 lines more"
    assert len(drawn({".".join(["a" * 1000] * 1000): "lora"})) < 1000
    assert len(drawn({f"a.{n * 2}": "lora" for n in range(5000)})) < 100
    assert len(drawn({".".join("9" * 5000): "lora"})) < 1000


texts = st.text(st.characters(codec="utf-8") | st.sampled_from("`\n-.~|:#<>\"'{}[]&*!%@\\\t\r\u2028\x85"), max_size=30)


@examples(50, 150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    paths=st.lists(texts, min_size=1, max_size=4, unique=True),
    method=texts,
    base=texts | st.just("someone/base"),
    tags=st.lists(texts.filter(str.isprintable), max_size=3),
    license=texts.filter(lambda text: text.isprintable() and text != "other"),
    rank=st.integers() | st.floats() | texts,
)
def test_no_name_breaks_out(
    tmp_path: Path, paths: list[str], method: str, base: str, tags: list[str], license: str, rank: object
) -> None:
    one = weights.LayerWeights(method, {"rank": rank, "alpha": 1.0}, {"a": torch.ones(1)})  # type: ignore[dict-item]
    adapter = weights.AdapterFile(dict.fromkeys(paths, one), base_model=base, task=base)
    card = weights.model_card(adapter, "peft", repo_id="me/style", license=license, tags=tags)
    (tmp_path / "README.md").write_text(card, encoding="utf-8", newline="")
    check_card(tmp_path / "README.md")
    found = fields(card)
    assert set(tags) <= set(found["tags"])  # type: ignore[call-overload]
    assert found.get("license") == license
    # The text has the parts it always has: one title, two blocks of Python, and at its end the tree.
    before, after = card.split("\n---\n", 1)[1].split("```text\n")
    tree, end = after.split("\n```\n")
    assert end == ""
    assert re.findall(r"^ {0,3}(?:```|~~~).*$", before, re.MULTILINE) == ["```python", "```"] * 2
    assert [line for line in before.splitlines() if line.startswith("#")] in (["# Adapter"], [f"# Adapter for {base}"])
    assert "`" not in tree
    assert len(tree.splitlines()) <= 40
    assert all(line.isprintable() for line in tree.splitlines())


yaml_like = st.text(
    st.sampled_from("ab01:,-?[]{}&*!|>'\"%@#~=<. \n\t\x00\x85\u2028é")
    | st.characters(codec="utf-8", exclude_categories=("Cs",)),
    max_size=60,
)
PIECES = [
    "license: mit",
    "tags:\n- a\n- [b]",
    "tags: null",
    "base_model: {a: 1}",
    "a: &x [*x]",
    "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "<<: 1",
    "? [a]\n: b",
    "- a",
    "!!python/object:os.x",
    "a: !!binary ?",
    "a: 2020-99-99",
    "a: 1:99:99",
    "a: 0x",
    "[" * 300,
]


@examples(100, 400, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    content=st.binary(max_size=60)
    | st.lists(yaml_like | st.sampled_from(PIECES), max_size=5).map(lambda lines: "\n".join(lines).encode()),
    end=st.sampled_from(["\n---\n", "\n---", "", "\r\n---\r\n", "\n--- \n# Title\n"]),
)
def test_any_card_is_sound_or_refused_in_a_sentence(tmp_path: Path, content: bytes, end: str) -> None:
    path = tmp_path / "README.md"
    path.write_bytes(b"---\n" + content + end.encode())
    try:
        check_card(path)
    except weights.FileFormatError as error:
        assert str(path) in str(error)
        assert str(error).endswith(".") and "\n" not in str(error)
