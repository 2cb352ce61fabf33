"""Parameters that PEFT trains and saves whole, on models of transformers: heads, norms, biases, rows of embeddings."""

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
from adapters import BitFit, Copy, LoRA, NormTuning, TrainableTokens
from tests.adapters.models import snapshot

SIZES = {"vocab_size": 20, "num_labels": 3, "pad_token_id": 0}
BERT = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 12, **SIZES}
LLAMA = {**BERT, "num_key_value_heads": 2, "pad_token_id": None}


def bert() -> nn.Module:
    return transformers.BertForSequenceClassification(transformers.BertConfig(**BERT))


def roberta() -> nn.Module:
    return transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(**{**BERT, "pad_token_id": 1}, max_position_embeddings=12)
    )


def distilbert() -> nn.Module:
    config = transformers.DistilBertConfig(dim=8, n_layers=1, n_heads=2, hidden_dim=12, **SIZES)
    return transformers.DistilBertForSequenceClassification(config)


def llama(tied: bool = True) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, tie_word_embeddings=tied))


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in {id(p): p for p in model.parameters()}.values():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # Biases and norms are not as they start.
    return model


TOKENS = torch.arange(2, 18).view(4, 4)


def run(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def perturbed(theirs: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return theirs.double().eval()


def from_there(base: nn.Module, config: peft.PeftConfig, folder: Path) -> Tensor:
    """The output of a trained adapter of PEFT, saved to a folder."""
    with warnings.catch_warnings(action="ignore"):
        theirs = perturbed(peft.get_peft_model(copy.deepcopy(base), config).double())
        theirs.save_pretrained(folder)
    return run(theirs)


def read_there(base: nn.Module, folder: Path) -> Tensor:
    with warnings.catch_warnings(action="ignore"):
        return run(peft.PeftModel.from_pretrained(copy.deepcopy(base), folder).double().eval())


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def perturb(patch: adapters.Patch) -> None:
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)


LN = {"bert": ["LayerNorm"], "llama": ["input_layernorm", "post_attention_layernorm", "norm"]}
FILES: dict[str, tuple[Callable[[], nn.Module], Callable[[], peft.PeftConfig]]] = {
    "bert": (bert, lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])),
    "roberta": (roberta, lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])),
    "distilbert": (distilbert, lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_lin", "v_lin"])),
    "embeddings": (bert, lambda: peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["word_embeddings"])),
    "a block": (
        bert,
        lambda: peft.LoraConfig(r=2, target_modules=["query"], modules_to_save=["bert.encoder.layer.0.output"]),
    ),
    "all biases": (bert, lambda: peft.LoraConfig(r=2, target_modules=["query"], bias="all")),
    "biases of lora": (bert, lambda: peft.LoraConfig(r=2, target_modules=["query", "dense"], bias="lora_only")),
    "all biases and a head": (
        bert,
        lambda: peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"], bias="all"),
    ),
    "norms of bert": (bert, lambda: peft.LNTuningConfig(task_type="SEQ_CLS", target_modules=LN["bert"])),
    "norms of llama": (llama, lambda: peft.LNTuningConfig(task_type="CAUSAL_LM", target_modules=LN["llama"])),
    "tokens": (llama, lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 2, 19])),
    "tokens, not tied": (
        lambda: llama(False),
        lambda: peft.TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[5, 2, 19]),
    ),
    "tokens of embeddings": (
        bert,
        lambda: peft.TrainableTokensConfig(target_modules=["word_embeddings"], token_indices=[5, 2, 19]),
    ),
    "tokens and lora": (
        llama,
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[5, 2, 19]),
    ),
    "tokens by name and lora": (
        llama,
        lambda: peft.LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [5, 2]}),
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_files_mean_the_same_there_and_here(name: str, tmp_path: Path) -> None:
    make, config = FILES[name]
    base = made(make)
    expected = from_there(base, config(), tmp_path / "theirs")
    assert not torch.allclose(expected, run(base), rtol=1e-3, atol=1e-3)
    ours = copy.deepcopy(base)
    before = snapshot(ours)
    patch = adapters.load(ours, tmp_path / "theirs")
    close(run(ours), expected)
    patch.save_pretrained(tmp_path / "ours")
    close(read_there(base, tmp_path / "ours"), expected)
    patch.merge()
    close(run(ours), expected)
    patch.eject()
    assert snapshot(ours) == before


METHODS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "a head": (bert, {"query": LoRA(rank=2), "classifier": Copy()}),
    "a head of layers": (roberta, {"query": LoRA(rank=2), "classifier": Copy()}),
    "two heads": (distilbert, {"q_lin": LoRA(rank=2), "pre_classifier": Copy(), "classifier": Copy()}),
    "a head alone": (bert, {"classifier": Copy()}),
    "tied embeddings": (llama, {"q_proj": LoRA(rank=2), "embed_tokens": Copy()}),
    "biases": (bert, {"**": BitFit()}),
    "biases with lora": (bert, {"query": LoRA(rank=2), "**": BitFit()}),
    "norms": (bert, {"LayerNorm": NormTuning()}),
    "norms and a head": (bert, {"LayerNorm": NormTuning(), "classifier": Copy()}),
    "tokens": (llama, {"embed_tokens": TrainableTokens((7, 3))}),
    "tokens and lora": (llama, {"q_proj": LoRA(rank=2), "embed_tokens": TrainableTokens((7, 3))}),
    "tokens and a layer": (llama, {"norm": Copy(), "embed_tokens": TrainableTokens((7, 3))}),
}


@pytest.mark.parametrize("name", METHODS)
def test_what_is_trained_here_loads_there(name: str, tmp_path: Path) -> None:
    make, rules = METHODS[name]
    base = made(make)
    ours = copy.deepcopy(base)
    patch = adapters.inject(ours, rules, seed=0)
    close(run(ours), run(base))
    perturb(patch)
    expected = run(ours)
    assert not torch.allclose(expected, run(base), rtol=1e-3, atol=1e-3)
    patch.save_pretrained(tmp_path / "ours")
    close(read_there(base, tmp_path / "ours"), expected)
    again = copy.deepcopy(base)
    adapters.load(again, tmp_path / "ours")
    close(run(again), expected)
