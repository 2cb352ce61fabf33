"""The promises on real models of transformers and diffusers, each built from a small configuration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapters
from adapters import AdapterError, LoRA, Patch
from tests.adapters.models import Case, perturb, snapshot
from tests.adapters.pretrained import BUILDERS, build

LORA = LoRA(rank=2, alpha=4)
ROWS = ["b", None, ("a", "b"), "b"]

# Stacked experts are targets when they are named.
EXPERTS = {"targets": [nn.Linear, nn.Embedding, "experts.gate_up_proj", "experts.down_proj"], "exclude": "lm_head"}
TARGETS: dict[str, dict[str, Any]] = {"mixtral": EXPERTS, "qwen_moe": EXPERTS}

# Layers whose output the model does not use: T5 calls the embeddings of its encoder and of its decoder, which share
# the weight of this one; the last block of SD3 computes no new text, and so asks no question of it.
UNUSED = {"t5": ["shared"], "sd3": ["transformer_blocks.1.attn.add_q_proj"]}

# Layers that are not given a batch with a row for each row of the model's batch: positions, relative positions, and
# the tokens of all rows as one long batch.
ROWLESS = {
    "t5": ["relative_attention_bias"],
    "whisper": ["encoder.embed_positions"],
    "qwen_moe": ["**.shared_expert.*", "shared_expert_gate"],
}


@pytest.fixture(params=BUILDERS)
def case(request: pytest.FixtureRequest) -> Case:
    return build(request.param)


def inject(case: Case, name: str, seed: int = 0, **options: Any) -> Patch:
    """Everything of a model adapted, with values that act."""
    patch = adapters.inject(case.model, LORA, name=name, **{**TARGETS.get(case.name, {}), **options})
    perturb(patch, seed, std=0.1)
    return patch


def close(actual: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    """Equal but for rounding, which depends on the largest numbers in the model."""
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol * expected.abs().max().item())


def test_starts_as_the_base_and_leaves_no_trace(case: Case) -> None:
    before, base = snapshot(case.model), case()
    first = adapters.inject(case.model, LORA, name="a", **TARGETS.get(case.name, {}))
    assert torch.equal(case(), base)
    assert not any(module.training for module in case.model.modules())
    perturb(first)
    second = inject(case, "b", 1)
    assert not torch.allclose(case(), base, rtol=1e-2, atol=1e-2)
    with adapters.use(case.model):
        assert torch.equal(case(), base)
    first.merge()
    first.eject()
    second.eject()
    assert snapshot(case.model) == before
    assert torch.equal(case(), base)


def test_every_target_changes_the_output(case: Case) -> None:
    base = case()
    patch = inject(case, "all")
    paths = list(patch.targets)
    patch.eject()
    unused = []
    for path in paths:
        # By its whole path: also the parameters of experts, which only names select.
        single = adapters.inject(case.model, LORA, path, exclude=lambda found, _, path=path: found != path)
        assert list(single.targets) == [path]
        perturb(single)
        if torch.equal(case(), base):
            unused.append(path)
        single.eject()
    assert unused == UNUSED.get(case.name, [])


def test_an_embedding_acts_at_every_use_of_its_weight() -> None:
    """T5 never calls `shared`: it is the encoder's and the decoder's embedding that have its weight."""
    case = build("t5")
    base = case()
    patch = adapters.inject(case.model, LORA, "shared")
    assert list(patch.targets) == ["shared", "encoder.embed_tokens", "decoder.embed_tokens"]
    perturb(patch)
    assert not torch.equal(case(), base)
    expected = case()
    patch.merge_and_eject()
    close(case(), expected)
    assert case.model.encoder.embed_tokens.weight is case.model.shared.weight


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(torch.float32, 1e-4, 1e-5), (torch.float64, 1e-10, 1e-10)])
def test_merged_computes_the_same(case: Case, dtype: torch.dtype, rtol: float, atol: float) -> None:
    case.model.to(dtype)
    if case.inputs.is_floating_point():
        case.inputs = case.inputs.to(dtype)
    base = case()
    first, second = inject(case, "a", 1), inject(case, "b", 2)
    both = case()
    assert not torch.allclose(both, base, rtol=1e-2)
    for patch in (second, first):
        patch.merge()
        close(case(), both, rtol, atol)
    for patch in (second, first):
        patch.unmerge()
    assert torch.equal(case(), both)
    first.merge_and_eject()
    second.merge_and_eject()
    close(case(), both, rtol, atol)
    assert not any(isinstance(module, adapters.AdaptedLayer) for module in case.model.modules())


def singles(case: Case) -> torch.Tensor:
    """What each row is in a batch that has the row's choice for all."""
    outputs = []
    for row, choice in enumerate(ROWS):
        names = () if choice is None else (choice,) if isinstance(choice, str) else choice
        with adapters.use(case.model, *names):
            outputs.append(case()[row])
    return torch.stack(outputs)


def excluded(name: str) -> list[str]:
    return [*ROWLESS.get(name, []), *(["lm_head"] if name in TARGETS else [])]


def test_each_row_has_its_own_adapters(case: Case) -> None:
    for seed, name in enumerate("ab"):
        inject(case, name, seed, exclude=excluded(case.name))
    expected = singles(case)
    with adapters.use(case.model, rows=ROWS):
        close(case(), expected)


@pytest.mark.parametrize(("name", "pattern"), [(name, p) for name, patterns in ROWLESS.items() for p in patterns])
def test_layers_that_are_given_no_rows_refuse(name: str, pattern: str) -> None:
    case = build(name)
    for seed, letter in enumerate("ab"):
        perturb(adapters.inject(case.model, LORA, pattern, name=letter), seed)
    with adapters.use(case.model, rows=ROWS), pytest.raises(AdapterError, match="rows= has 4 entries for a batch of"):
        case()
    with adapters.use(case.model, rows=[None] * 4), pytest.raises(AdapterError, match="rows= has 4 entries"):
        case()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "whisper", "mixtral"])
def test_text_is_generated_by_the_adapters_of_each_row(name: str) -> None:
    """With its cache, a model is given one token at a time: rows of length one, and positions that all rows share."""
    case = build(name)
    for seed, letter in enumerate("ab"):
        inject(case, letter, seed, exclude=excluded(name))
    options = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5, "return_dict_in_generate": True}
    case.run = lambda m, x: torch.stack(m.generate(x, output_logits=True, **options).logits, dim=1)
    expected = singles(case)
    assert expected.shape[:2] == (4, 5)
    with adapters.use(case.model, rows=ROWS):
        close(case(), expected)


def test_base_checkpoints_load_and_patched_ones_load_into_the_base(case: Case) -> None:
    base, output = {key: value.clone() for key, value in case.model.state_dict().items()}, case()
    inject(case, "a")
    adapted, patched = case(), case.model.state_dict()
    assert [key for key in patched if key in base] == list(base)
    for key, value in case.model.state_dict(keep_vars=True).items():
        if key in base and value.is_floating_point():
            value.data.mul_(2)
    assert not torch.equal(case(), adapted)
    case.model.load_state_dict(base)
    assert torch.equal(case(), adapted)

    bare = build(case.name, seed=9).model
    result = bare.load_state_dict(patched, strict=False)
    assert result.missing_keys == []
    assert set(result.unexpected_keys) == patched.keys() - base.keys()
    assert torch.equal(Case(case.name, bare, case.inputs, case.run)(), output)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_experts_however_they_are_computed(implementation: str) -> None:
    """The experts of transformers have one forward for each way to multiply, and none of them is a layer's own."""
    case = build("mixtral")
    before = case()
    case.model.set_experts_implementation(implementation)
    close(case(), before)
    for seed, name in enumerate("ab"):
        perturb(adapters.inject(case.model, LORA, EXPERTS["targets"][2:], name=name), seed, std=0.1)
    both, expected = case(), singles(case)
    assert not torch.allclose(both, before, rtol=1e-2)
    with adapters.use(case.model, rows=ROWS):
        close(case(), expected)
    for patch in adapters.patches(case.model).values():
        patch.merge()
        close(case(), both)


class Positions(nn.Embedding):
    """What gives the positions of a batch, one for all of its rows."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.weight[: tokens.shape[1]]


@pytest.mark.parametrize("length", range(1, 6))
def test_a_layer_whose_output_has_no_rows_refuses(length: int) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = Positions(5, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.positions(tokens) + tokens[..., None]

    model = Model()
    for name in "ab":
        adapters.inject(model, LoRA(rank=1), name=name)
    with adapters.use(model, rows=ROWS), pytest.raises(AdapterError, match="a row of output for each row of input"):
        model(torch.zeros(4, length, dtype=torch.long))


def test_tied_heads_stay_what_they_are() -> None:
    """An adapted embedding is not an adapted head: the head still computes with the weight they share."""
    for name, embedding, head in [("gpt2", "transformer.wte", "lm_head"), ("llama", "model.embed_tokens", "lm_head")]:
        case = build(name)
        weight = case.model.get_submodule(head).weight
        assert case.model.get_submodule(embedding).weight is weight
        patch = adapters.inject(case.model, LORA, embedding)
        perturb(patch)
        expected = case()
        patch.merge()
        assert case.model.get_submodule(head).weight is weight
        close(case(), expected)
        patch.eject()
        assert case.model.get_submodule(embedding).weight is weight
