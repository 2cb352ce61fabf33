"""Prompts and prefixes of the real PEFT mean the same here, in logits and in what is generated; and ours there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

import adapters
import weights
from tests.adapters.models import snapshot
from tests.adapters.pretrained import build

TASKS = {"llama": "CAUSAL_LM", "gpt2": "CAUSAL_LM", "bert": "SEQ_CLS"}
CONFIGS: dict[str, Callable[..., peft.PeftConfig]] = {
    "prompt": lambda **more: peft.PromptTuningConfig(num_virtual_tokens=3, **more),
    "prefix": lambda **more: peft.PrefixTuningConfig(num_virtual_tokens=3, **more),
    "projected prefix": lambda **more: peft.PrefixTuningConfig(
        num_virtual_tokens=3, prefix_projection=True, encoder_hidden_size=5, **more
    ),
}


@pytest.fixture(params=[(model, kind) for model in TASKS for kind in CONFIGS], ids=lambda pair: "-".join(pair))
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, Any, str]:
    """A model, the same one with an adapter of PEFT that has values, and where that one is saved."""
    name, kind = request.param
    model = build(name).model
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(copy.deepcopy(model), CONFIGS[kind](task_type=TASKS[name])).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():  # For a classifier, its head too.
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.3)
        theirs.save_pretrained(tmp_path / "theirs")
    return model, theirs, str(tmp_path / "theirs")


def inputs(padding: str | None) -> dict[str, Tensor]:
    tokens = torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(tokens)
    if padding == "left":
        mask[0, :2] = mask[2, :3] = 0
    if padding == "right":
        mask[1, -1:] = mask[3, -3:] = 0
    return {"input_ids": tokens.where(mask == 1, 0), **({} if padding is None else {"attention_mask": mask})}


def of_text(logits: Tensor) -> Tensor:
    """PEFT gives logits for the prompt as well."""
    return logits[:, -6:] if logits.ndim == 3 else logits


@pytest.mark.parametrize("padding", [None, "none", "left", "right"])
@torch.no_grad()
def test_logits_are_the_same(pair: tuple[nn.Module, Any, str], padding: str | None) -> None:
    model, theirs, folder = pair
    given = inputs(padding)
    before, base = snapshot(model), model(**given).logits
    expected = of_text(theirs(**given).logits)
    assert not torch.allclose(expected, base, rtol=1e-2, atol=1e-2)
    patch = adapters.load(model, folder)
    torch.testing.assert_close(model(**given).logits, expected, rtol=1e-5, atol=1e-5)
    with adapters.use(model):
        assert torch.equal(model(**given).logits, base)
    patch.eject()
    assert snapshot(model) == before


@torch.no_grad()
def test_files_from_here_load_there(pair: tuple[nn.Module, Any, str], tmp_path: Path) -> None:
    model, theirs, folder = pair
    given = inputs("left")
    patch = adapters.load(model, folder)
    patch.save_pretrained(tmp_path / "ours")
    patch.eject()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Unexpected keyword")
        again = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path / "ours")).eval()
    assert type(again) is type(theirs)
    torch.testing.assert_close(again(**given).logits, theirs(**given).logits, rtol=1e-5, atol=1e-5)
    one, other = (weights.open(f"{where}/adapter_model.safetensors") for where in (folder, tmp_path / "ours"))
    assert {name: tensor.shape for name, tensor in one.items()} == {name: t.shape for name, t in other.items()}
    configs = [peft.PeftConfig.from_pretrained(where).to_dict() for where in (folder, str(tmp_path / "ours"))]
    for config in configs:
        config["modules_to_save"] = sorted(set(config["modules_to_save"] or ()) - {"score"})
    # What is of no use to a reader: how a prefix was trained, and the sizes of attention for embeddings.
    of_no_use = {"encoder_hidden_size", "prefix_projection", "num_layers", "num_attention_heads", "prompt_tuning_init"}
    if "prefix_projection" in configs[0]:
        of_no_use -= {"num_layers", "num_attention_heads"}
    one_config, other_config = ({k: v for k, v in c.items() if k not in of_no_use} for c in configs)
    assert one_config == other_config


@pytest.mark.parametrize("beams", [1, 2])
@torch.no_grad()
def test_the_same_text_is_generated(pair: tuple[nn.Module, Any, str], beams: int) -> None:
    model, theirs, folder = pair
    if not model.can_generate():
        return
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, **inputs("none")}
    base = model.generate(**options)
    with warnings.catch_warnings(action="ignore"):
        expected = theirs.generate(**options)
    assert not torch.equal(base, expected)
    patch = adapters.load(model, folder)
    assert torch.equal(model.generate(**options), expected)
    assert torch.equal(model.generate(**options, use_cache=False), expected)
    with adapters.use(model):
        assert torch.equal(model.generate(**options), base)
    patch.eject()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_padding_does_not_change_what_a_prompt_generates(name: str, tmp_path: Path) -> None:
    """PEFT drops the positions that transformers gives to padded rows, so a row has other logits than by itself.

    Its prefixes keep them; its prompts do not.
    """
    model = build(name).model
    tokens = torch.randint(3, 20, (1, 4), generator=torch.Generator().manual_seed(1))
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), tokens], 1)
    mask = (padded != 0).long()
    options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    for kind in ("prompt", "prefix"):
        with warnings.catch_warnings(action="ignore"):
            theirs = peft.get_peft_model(copy.deepcopy(model), CONFIGS[kind](task_type="CAUSAL_LM")).eval()
            theirs.save_pretrained(tmp_path / kind)
            alone = theirs.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options).logits[0]
            there = theirs.generate(input_ids=padded, attention_mask=mask, **options).logits[0]
        assert torch.allclose(there, alone, rtol=1e-3, atol=1e-3) == (kind == "prefix")
        patch = adapters.load(model, tmp_path / kind)
        one = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), **options)
        other = model.generate(input_ids=padded, attention_mask=mask, **options)
        torch.testing.assert_close(one.logits[0], alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(torch.stack(other.logits), torch.stack(one.logits), rtol=1e-4, atol=1e-4)
        patch.eject()


@torch.no_grad()
def test_a_padded_text_is_classified_by_its_last_token(tmp_path: Path) -> None:
    """PEFT's prompts classify a text that is padded on its right by the padding: it hands over no tokens."""
    torch.default_generator.manual_seed(0)
    config = build("llama").model.config
    model = transformers.LlamaForSequenceClassification(config).eval()
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    tokens = torch.randint(3, 20, (1, 4))
    padded = torch.cat([tokens, torch.zeros(1, 2, dtype=torch.long)], 1)
    mask = (padded != 0).long()
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(copy.deepcopy(model), CONFIGS["prompt"](task_type="SEQ_CLS")).eval()
        theirs.save_pretrained(tmp_path)
        alone = theirs(input_ids=tokens).logits
        assert not torch.allclose(theirs(input_ids=padded, attention_mask=mask).logits, alone, rtol=1e-3)
    adapters.load(model, tmp_path)
    torch.testing.assert_close(model(input_ids=tokens).logits, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(input_ids=padded, attention_mask=mask).logits, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_files_for_an_encoder_and_a_decoder_are_refused(kind: str, tmp_path: Path) -> None:
    model = build("t5").model
    with warnings.catch_warnings(action="ignore"):
        theirs = peft.get_peft_model(copy.deepcopy(model), CONFIGS[kind](task_type="SEQ_2_SEQ_LM"))
        theirs.save_pretrained(tmp_path)
    with pytest.raises(weights.FileFormatError, match="num_transformer_submodules=2 is not supported"):
        adapters.load(model, tmp_path)
