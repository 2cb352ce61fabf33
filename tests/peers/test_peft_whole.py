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
import weights
from adapters import BitFit, Copy, Full, LoRA, NormTuning, TrainableTokens
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
    torch.default_generator.manual_seed(0)
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


# What PEFT gets wrong


class Tied(nn.Module):
    """A language model that is none of transformers."""

    def __init__(self, tied: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 4)
        self.head = nn.Linear(4, 20, bias=bias)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh())


def replaced(weight: Tensor, rows: Tensor) -> Tensor:
    """The weight with rows for the tokens 5 and 2."""
    weight = weight.detach().clone()
    weight[5], weight[2] = rows
    return weight


def there(base: nn.Module, target: str) -> nn.Module:
    config = peft.TrainableTokensConfig(target_modules=[target], token_indices=[5, 2])
    return peft.get_peft_model(copy.deepcopy(base), config).double()


def test_rows_of_tied_weights_are_merged_as_they_were_computed() -> None:
    """PEFT asks the configuration of transformers whether weights are tied. Where it has none to ask, the head computes
    without the rows until they are merged, and with them after: the weight is one."""
    base = Tied().double()
    theirs = perturbed(there(base, "embed"))
    (rows,) = [p.detach() for p in theirs.parameters() if p.requires_grad]
    expected = nn.functional.embedding(TOKENS, weight := replaced(base.embed.weight, rows)).tanh() @ weight.T
    assert not torch.allclose(theirs(TOKENS), expected)
    close(theirs.merge_and_unload()(TOKENS), expected)
    patch = adapters.inject(base, TrainableTokens((5, 2)), "embed")
    patch.load_state_dict({**patch.state_dict(), "embed.trainable_tokens_delta": rows})
    close(base(TOKENS), expected)
    patch.merge()
    close(base(TOKENS), expected)


def test_rows_of_a_head_leave_its_bias() -> None:
    """PEFT computes a head with rows of its own without the bias, so that the start is no identity."""
    base = Tied(tied=False, bias=True).double()
    theirs = there(base, "head")
    close(theirs(TOKENS), base(TOKENS) - base.head.bias)
    adapters.inject(model := copy.deepcopy(base), TrainableTokens((5, 2)), "head")
    close(model(TOKENS), base(TOKENS))


def test_an_embedding_with_a_forward_of_its_own_keeps_it() -> None:
    """PEFT looks up in the weight itself, and knows of no factor but `embed_scale`."""

    class Doubled(nn.Embedding):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) * 2

    base = nn.Sequential(Doubled(20, 4)).double()
    close(there(base, "0")(TOKENS) * 2, base(TOKENS))
    adapters.inject(model := copy.deepcopy(base), TrainableTokens((5, 2)), "0")
    close(model(TOKENS), base(TOKENS))


def test_a_head_that_is_named_with_its_embedding_is_adapted_once() -> None:
    """PEFT puts a tied head into two wrappers, if both are named, and cannot run it."""
    base = made(llama)
    config = peft.TrainableTokensConfig(target_modules=["embed_tokens", "lm_head"], token_indices=[5, 2])
    with warnings.catch_warnings(action="ignore"), pytest.raises(ValueError, match="wraps an unknown layer type"):
        run(peft.get_peft_model(copy.deepcopy(base), config))
    patch = adapters.inject(model := copy.deepcopy(base), TrainableTokens((5, 2)), ["embed_tokens", "lm_head"])
    assert patch.num_parameters() == 2 * 8
    close(run(model), run(base))


def test_biases_of_attention_are_saved(tmp_path: Path) -> None:
    """PEFT's `bias="all"` leaves out `in_proj_bias`, which it loads where a file has it."""
    base = nn.ModuleDict({"attn": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4)}).double()
    config = peft.LoraConfig(target_modules=["linear"], bias="all")
    theirs = peft.get_peft_model(copy.deepcopy(base), config)
    trained = {name for name, parameter in theirs.named_parameters() if parameter.requires_grad}
    assert "base_model.model.attn.out_proj.bias" in trained and "base_model.model.attn.in_proj_bias" not in trained
    patch = adapters.inject(base, {"linear": LoRA(rank=2), "**": BitFit()})
    perturb(patch)
    patch.save_pretrained(tmp_path / "ours")
    x = torch.randn(3, 1, 4).double()
    expected = base["attn"](x, x, x)[0]
    patch.eject()
    with warnings.catch_warnings(action="ignore"):  # What is in the file, PEFT loads.
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "ours").base_model.model
    close(again["attn"](x, x, x)[0], expected)
    adapters.load(base, tmp_path / "ours")
    close(base["attn"](x, x, x)[0], expected)


def test_a_head_whose_name_ends_that_of_another_layer(tmp_path: Path) -> None:
    """PEFT takes "classifier" for "pre_classifier" too, and then misses the tensors of that one."""
    base = made(distilbert)
    patch = adapters.inject(ours := copy.deepcopy(base), {"q_lin": LoRA(rank=2), "classifier": Copy()})
    perturb(patch)
    patch.save_pretrained(tmp_path / "ours")
    with pytest.raises(KeyError, match="pre_classifier"):
        read_there(base, tmp_path / "ours")
    adapters.load(again := copy.deepcopy(base), tmp_path / "ours")
    close(run(again), run(ours))


# What PEFT's files cannot hold


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"LayerNorm": NormTuning(), "query": BitFit()}, "LN_TUNING has no biases beside it in PEFT's files"),
        ({"LayerNorm": NormTuning(), "word_embeddings": TrainableTokens((1,))}, "LN_TUNING has no tokens beside it"),
        ({"LayerNorm": NormTuning(), "query": LoRA(rank=1)}, r"several methods \(lora, norm\), and PEFT keeps one"),
        ({"word_embeddings": TrainableTokens((1,)), "position_embeddings": TrainableTokens((2,))}, "differ in tokens"),
        ({"query": Full()}, "it has the method 'full', which is none of"),
    ],
)
def test_what_their_files_cannot_hold_is_said(rules: Any, message: str, tmp_path: Path) -> None:
    patch = adapters.inject(model := made(bert), rules)
    assert adapters.patches(model)
    with pytest.raises(weights.FileFormatError, match=message):
        patch.save_pretrained(tmp_path / "ours", format="peft")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "config",
    [
        lambda: peft.LNTuningConfig(target_modules=["1"]),
        lambda: peft.LoraConfig(target_modules=["0"], modules_to_save=["1"]),
    ],
)
def test_statistics_that_are_not_the_models_are_refused(config: Callable[[], Any], tmp_path: Path) -> None:
    base = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    theirs = peft.get_peft_model(copy.deepcopy(base), config())
    theirs.save_pretrained(tmp_path / "before")
    theirs.train()(torch.randn(4, 3))
    theirs.save_pretrained(tmp_path / "after")
    adapters.load(base, tmp_path / "before").eject()
    with pytest.raises(adapters.LayerMismatchError, match="1: running_mean is not that of the model"):
        adapters.load(base, tmp_path / "after")
