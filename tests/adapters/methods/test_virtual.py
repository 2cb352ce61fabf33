"""Prompts and prefixes are a text before the text: with the tensors of real tokens, they do what these tokens do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import adapters
from adapters import (
    AdapterError,
    LayerMismatchError,
    LoRA,
    PatchStateError,
    PrefixTuning,
    PromptTuning,
    RowsError,
    TargetError,
)
from tests.adapters.models import perturb, snapshot
from tests.adapters.pretrained import build

BEFORE = torch.tensor([[5, 9, 3]])
TOKENS = torch.randint(3, 20, (4, 6), generator=torch.Generator().manual_seed(1))
MASK = torch.ones_like(TOKENS)
MASK[0, :2] = MASK[3, :4] = 0
LONGER = torch.cat([BEFORE.expand(4, -1), TOKENS], 1)
LONGER_MASK = torch.cat([torch.ones(4, 3, dtype=torch.long), MASK], 1)


def opt() -> nn.Module:
    """A model whose head calls the decoder inside of its transformer."""
    torch.default_generator.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=20,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=2,
        ffn_dim=24,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    model = transformers.OPTForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def language_model(name: str) -> Any:
    return (opt() if name == "opt" else build(name).model).double()


def inject(model: nn.Module, kind: str, name: str = "default", tokens: Tensor = BEFORE) -> adapters.Patch:
    """A prompt or a prefix that is a text."""
    if kind == "prompt":
        return adapters.inject(model, PromptTuning(tokens.shape[1], text=tuple(tokens[0].tolist())), name=name)
    patch = adapters.inject(model, PrefixTuning(tokens.shape[1]), name=name)
    with torch.no_grad(), adapters.use(model):
        cache = model(tokens, use_cache=True).past_key_values
    pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    values = torch.stack(pairs).permute(3, 0, 1, 2, 4).flatten(1)
    patch.load_state_dict(dict.fromkeys(patch.state_dict(), values))
    return patch


@pytest.fixture(params=[(name, kind) for name in ("llama", "gpt2", "opt") for kind in ("prompt", "prefix")])
def pair(request: pytest.FixtureRequest) -> tuple[Any, str]:
    return language_model(request.param[0]), request.param[1]


def close(one: Tensor, other: Tensor, where: Tensor | None = None) -> None:
    if where is not None:
        one, other = one[where == 1], other[where == 1]
    # transformers turns by positions in single precision, on some processors in other digits for other lengths.
    torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


@torch.no_grad()
def test_it_is_a_text_before_the_text(pair: tuple[Any, str]) -> None:
    model, kind = pair
    model(TOKENS, output_hidden_states=True)  # Transformers puts hooks into a model that is first asked for these.
    before, base = snapshot(model), model(TOKENS).logits
    expected = model(LONGER).logits[:, 3:]
    padded = model(LONGER, attention_mask=LONGER_MASK).logits[:, 3:]
    patch = inject(model, kind)
    close(model(TOKENS).logits, expected)
    close(model(input_ids=TOKENS, attention_mask=MASK).logits, padded, MASK)
    close(model(inputs_embeds=model.get_input_embeddings()(TOKENS)).logits, expected)
    close(model(TOKENS, logits_to_keep=1).logits, expected[:, -1:])
    output = model(TOKENS, output_hidden_states=True)
    assert output.hidden_states[-1].shape == (4, 6, 16)
    # The loss is that of the text, whose first token follows the prompt.
    labels = LONGER.clone()
    labels[:, :4] = -100
    with adapters.use(model):
        loss = model(LONGER, labels=labels).loss
        assert torch.equal(model(TOKENS).logits, base)
    torch.testing.assert_close(model(TOKENS, labels=TOKENS).loss, loss)  # Transformers has it in single precision.
    twin = copy.deepcopy(model)
    close(twin(TOKENS).logits, expected)
    patch.scale = 0.0
    assert torch.equal(model(TOKENS).logits, base)
    patch.eject()
    assert snapshot(model) == before
    close(twin(TOKENS).logits, expected)


@torch.no_grad()
def test_positions_begin_after_it(pair: tuple[Any, str]) -> None:
    model, kind = pair
    positions = (LONGER_MASK.cumsum(1) - 1).clamp(min=0)
    expected = model(LONGER, attention_mask=LONGER_MASK, position_ids=positions).logits[:, 3:]
    inject(model, kind)
    own = positions[:, 3:] - 3
    close(model(TOKENS, attention_mask=MASK, position_ids=own).logits, expected, MASK)


@torch.no_grad()
def test_generation(pair: tuple[Any, str]) -> None:
    model, kind = pair
    options = {"max_new_tokens": 5, "do_sample": False}
    given = {"inputs": TOKENS, "attention_mask": MASK}
    base = model.generate(**given, **options)
    expected = model.generate(LONGER, attention_mask=LONGER_MASK, **options)[:, 3:]
    patch = inject(model, kind)
    for more in ({}, {"use_cache": False}):
        assert torch.equal(model.generate(**given, **options, **more), expected)
    twice = model.generate(**given, **options, num_beams=3)
    with adapters.use(model):
        assert torch.equal(model.generate(**given, **options), base)
        assert torch.equal(model.generate(LONGER, attention_mask=LONGER_MASK, **options, num_beams=3)[:, 3:], twice)
    patch.eject()
    assert torch.equal(model.generate(**given, **options), base)


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_goes_on(pair: tuple[Any, str], masked: bool) -> None:
    model, kind = pair
    expected = model(LONGER, **({"attention_mask": LONGER_MASK} if masked else {})).logits[:, 3:]
    patch = inject(model, kind)

    def mask(end: int) -> dict[str, Tensor]:
        return {"attention_mask": MASK[:, :end]} if masked else {}

    first = model(TOKENS[:, :4], use_cache=True, **mask(4))
    cache, other = first.past_key_values, copy.deepcopy(first.past_key_values)
    close(first.logits, expected[:, :4], MASK[:, :4] if masked else None)
    for held in (cache, other):
        close(model(TOKENS[:, 4:], past_key_values=held, **mask(6)).logits, expected[:, 4:])
    if masked:
        with pytest.raises(AdapterError, match="The mask is for more tokens than there are"):
            model(TOKENS[:, 5:], past_key_values=cache, attention_mask=torch.ones(4, 8, dtype=torch.long))
    with adapters.use(model):
        without = model(TOKENS, use_cache=True).past_key_values
    with pytest.raises(AdapterError, match="The cache was filled without the tokens of 'default'"):
        model(TOKENS[:, :1], past_key_values=without)
    patch.eject()


@pytest.mark.parametrize("kinds", [("prompt", "prompt"), ("prefix", "prompt"), ("prompt", "prefix")])
@torch.no_grad()
def test_several_at_once(kinds: tuple[str, str]) -> None:
    """In the order of their injection; but a prefix comes before every prompt."""
    model = language_model("llama")
    one, other = torch.tensor([[5, 9, 3]]), torch.tensor([[11, 4]])
    before = snapshot(model)
    options = {"max_new_tokens": 4, "do_sample": False}
    order = (other, one) if kinds == ("prompt", "prefix") else (one, other)
    text = torch.cat([tokens.expand(4, -1) for tokens in (*order, TOKENS)], 1)
    expected, generated = model(text).logits[:, 5:], model.generate(text, **options)[:, 5:]
    patches = [inject(model, kinds[0], "one", one), inject(model, kinds[1], "two", other)]
    close(model(TOKENS).logits, expected)
    assert torch.equal(model.generate(TOKENS, **options), generated)
    lora = adapters.inject(model, LoRA(rank=2), name="lora", seed=1)
    perturb(lora)
    both = model(TOKENS).logits
    lora.merge()
    close(model(TOKENS).logits, both)
    patches[0].eject()
    lora.eject()
    patches[1].eject()
    assert snapshot(model) == before


@torch.no_grad()
def test_two_prefixes() -> None:
    model = language_model("llama")
    patches = [inject(model, "prefix", "one"), inject(model, "prefix", "two", torch.tensor([[11, 4]]))]
    both = model(TOKENS).logits
    with adapters.use(model, "one"):
        assert not torch.allclose(model(TOKENS).logits, both)
    step = model(TOKENS[:, :5], use_cache=True)
    close(model(TOKENS[:, 5:], past_key_values=step.past_key_values).logits, both[:, 5:])
    for patch in patches:
        patch.eject()


@torch.no_grad()
def test_an_encoder_with_types_of_tokens() -> None:
    """A prompt is of the first type, and what is pooled is its first position."""
    model = language_model("bert")
    types = torch.arange(6).expand(4, -1) % 2
    longer = torch.cat([torch.zeros(4, 3, dtype=torch.long), types], 1)
    expected = model(LONGER, token_type_ids=longer, attention_mask=LONGER_MASK).logits
    patch = inject(model, "prompt")
    close(model(TOKENS, token_type_ids=types, attention_mask=MASK).logits, expected)
    output = model.bert(TOKENS, output_hidden_states=True, return_dict=False)
    assert output[0].shape == (4, 6, 16)
    patch.eject()


@pytest.mark.parametrize("kind", [PromptTuning(3), PrefixTuning(3), PrefixTuning(3, projection=5)], ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_a_step_of_training_moves_only_its_tensors(kind: adapters.Method, name: str, tmp_path: Path) -> None:
    model = build(name).model
    before = snapshot(model)
    patch = adapters.inject(model, kind, seed=3)
    model.train()
    optimizer = torch.optim.SGD(patch.parameters(), 0.1)
    labels = TOKENS if name != "bert" else torch.tensor([0, 1, 0, 1])
    loss = model(TOKENS, attention_mask=MASK, labels=labels).loss
    loss.backward()
    ours = {id(parameter) for parameter in patch.parameters()}
    assert all((parameter.grad is not None) == (id(parameter) in ours) for parameter in model.parameters())
    assert all(parameter.grad.any() for parameter in patch.parameters())
    optimizer.step()
    model.eval()
    with torch.no_grad():
        expected = model(TOKENS).logits
        patch.save_pretrained(tmp_path)
        patch.eject()
        assert snapshot(model) == before
        again = adapters.load(model, tmp_path, trainable=True)
        torch.testing.assert_close(model(TOKENS).logits, expected)
        assert [len(parameter) for parameter in again.parameters()] == [3]
        for call in (again.merge, again.merge_and_eject):
            with pytest.raises(PatchStateError, match="is no change of weights"):
                call()
        again.eject()
    assert snapshot(model) == before


@torch.no_grad()
def test_a_prompt_starts_as_tokens() -> None:
    model = build("llama").model
    weight = model.get_input_embeddings().weight
    (start,) = adapters.inject(model, PromptTuning(5, text=(4, 7))).state_dict().values()
    assert torch.equal(start, weight[[4, 7, 4, 7, 4]])
    (random,) = adapters.inject(model, PromptTuning(5), name="random", seed=1).state_dict().values()
    assert all((weight == row).all(1).any() for row in random)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
@torch.no_grad()
def test_rows(kind: str) -> None:
    """Rows are right without a cache, and refused with one, which would be of another length in each row."""
    model = language_model("llama")
    base = model(TOKENS, attention_mask=MASK).logits
    inject(model, kind)
    full = model(TOKENS, attention_mask=MASK).logits
    with adapters.use(model, rows=["default", None, None, "default"]):
        mixed = model(TOKENS, attention_mask=MASK, use_cache=False).logits
        close(mixed, torch.stack([full[0], base[1], base[2], full[3]]))
        with pytest.raises(RowsError, match="pass use_cache=False"):
            model(TOKENS, attention_mask=MASK, use_cache=True)
        with pytest.raises(RowsError, match="pass use_cache=False"):
            model.generate(TOKENS, max_new_tokens=2)


@pytest.mark.parametrize("kind", [PromptTuning(3), PrefixTuning(3)], ids=str)
def test_inputs_that_do_not_fit_are_refused(kind: adapters.Method) -> None:
    model = build("gpt2").model
    adapters.inject(model, kind)
    with pytest.raises(AdapterError, match=r"attention_mask of shape \(batch, tokens\)"):
        model(TOKENS, attention_mask=torch.ones(4, 1, 6, 6))
    with pytest.raises(AdapterError, match="rows of one text each"):
        model(TOKENS, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
    with pytest.raises(AdapterError, match="a cache that grows, not a StaticCache"):
        model.generate(TOKENS, max_new_tokens=2, cache_implementation="static")
    if isinstance(kind, PromptTuning):
        with pytest.raises(AdapterError, match="GPT2Model has no type of token for a prompt"):
            model(TOKENS, token_type_ids=torch.zeros_like(TOKENS))
    else:
        model.gradient_checkpointing_enable()
        with pytest.raises(AdapterError, match="which gradient checkpointing does without"):
            model.train()(TOKENS)


def test_positions_that_begin_at_another_number_are_refused() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = transformers.RobertaForMaskedLM(transformers.RobertaConfig(vocab_size=20, **sizes)).eval()
    adapters.inject(model, PromptTuning(3))
    model(TOKENS)
    with pytest.raises(AdapterError, match="that begin at 0, or none"):
        model(TOKENS, position_ids=torch.arange(2, 8).expand(4, -1))


@pytest.mark.parametrize("kind", [PromptTuning(3), PrefixTuning(3)], ids=str)
def test_files_for_another_model_are_refused(kind: adapters.Method, tmp_path: Path) -> None:
    model = build("gpt2").model
    adapters.inject(model, kind).save_pretrained(tmp_path)
    with pytest.raises(LayerMismatchError, match="it is not a model of transformers"):
        adapters.load(nn.Sequential(nn.Linear(2, 2)), tmp_path)
    with pytest.raises(LayerMismatchError, match="it has an encoder and a decoder"):
        adapters.load(build("t5").model, tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    other = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=20, **sizes))
    with pytest.raises(LayerMismatchError, match=r"model(: prompt_embeddings is \(3, 16\)| has a num_layers of 1)"):
        adapters.load(other, tmp_path)


def test_a_file_holds_one() -> None:
    model = nn.ModuleDict({"one": build("bert").model.bert, "two": build("bert").model.bert})
    patch = adapters.inject(model, PromptTuning(3), ["one", "two"])
    with pytest.raises(PatchStateError, match="A file holds one PromptTuning, not another at two"):
        patch.adapter_file()


def test_scores_of_a_router_are_refused() -> None:
    model = build("mixtral").model
    adapters.inject(model, PromptTuning(3))
    model(TOKENS)
    with pytest.raises(AdapterError, match="cannot tell the router's scores"):
        model(TOKENS, output_router_logits=True)


def windowed() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.MistralForCausalLM(transformers.MistralConfig(vocab_size=20, sliding_window=4, **sizes))


def falcon() -> nn.Module:
    return transformers.FalconForCausalLM(
        transformers.FalconConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=20, hidden_size=8, num_hidden_layers=1, state_size=4)
    )


def distilbert() -> nn.Module:
    return transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(vocab_size=20, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    )


PREFIX, PROMPT = PrefixTuning(3), PromptTuning(3)


@pytest.mark.parametrize(
    ("make", "method", "message"),
    [
        (lambda: build("t5").model, PROMPT, "it has an encoder and a decoder"),
        (lambda: build("t5").model, PREFIX, "it has an encoder and a decoder"),
        (lambda: build("whisper").model, PROMPT, "it has an encoder and a decoder"),
        (lambda: build("clip").model, PROMPT, "it takes more than text|no transformer below it"),
        (lambda: build("vit").model, PROMPT, "it takes no input_ids and no inputs_embeds"),
        (lambda: build("unet").model, PROMPT, "it is not a model of transformers"),
        (lambda: nn.Sequential(nn.Linear(2, 2)), PREFIX, "it is not a model of transformers"),
        (lambda: build("llama").model.model, PROMPT, "it has no transformer below it: use a model with a head"),
        (mamba, PROMPT, "it takes cache_params"),
        (mamba, PREFIX, "it takes no past_key_values"),
        (distilbert, PREFIX, "it takes no past_key_values"),
        (windowed, PREFIX, "has no full attention in every layer"),
        (falcon, PREFIX, "has keys of a shape of its own"),
        (lambda: build("llama").model, PrefixTuning(3, num_layers=4), "has a num_layers of 2, not 4"),
        (lambda: build("llama").model, PrefixTuning(3, num_attention_heads=2), "num_attention_heads of 1, not 2"),
        (lambda: build("llama").model, PromptTuning(3, text=(20,)), "has no tokens beyond 19"),
    ],
)
def test_models_that_need_something_else_are_refused(make: Any, method: adapters.Method, message: str) -> None:
    model = make()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        adapters.inject(model, method)
    assert snapshot(model) == before


class Embedder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = build("bert").model.bert

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encoder(tokens).last_hidden_state.mean(1)


def test_a_transformer_inside_of_another_model_is_found(tmp_path: Path) -> None:
    model = Embedder().eval()
    patch = adapters.inject(model, PromptTuning(3))
    assert list(patch.targets) == ["encoder"]
    adapted = model(TOKENS)
    patch.save_pretrained(tmp_path)
    patch.eject()
    adapters.inject(model, LoRA(rank=2), "query")
    adapters.inject(model, PromptTuning(2), name="beside").enabled = False
    loaded = adapters.load(model, tmp_path)
    assert torch.equal(model(TOKENS), adapted)
    with pytest.raises(PatchStateError, match="no change of weights"):
        loaded.merge()


def test_a_transformer_inside_of_another_model_can_be_named() -> None:
    model = Embedder().eval()
    with pytest.raises(TargetError, match="is a BertEncoder, which PromptTuning cannot adapt"):
        adapters.inject(model, PromptTuning(3), "encoder.encoder")
    base = model(TOKENS)
    adapters.inject(model, PromptTuning(3), lambda path, module: path == "encoder")
    assert not torch.allclose(model(TOKENS), base) and model(TOKENS).shape == base.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PromptTuning(0), "a num_virtual_tokens of 1 or more, not 0"),
        (lambda: PrefixTuning(1.5), "a num_virtual_tokens of 1 or more, not 1.5"),
        (lambda: PrefixTuning(3, projection=0), "a projection of 1 or more, not 0"),
    ],
)
def test_numbers_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(AdapterError, match=message):
        make()
