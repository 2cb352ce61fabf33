"""Choosing layers: the patterns, what they match, and what is said when they match nothing."""

from __future__ import annotations

import dataclasses
import re
import signal
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import adapters
import fluxion as fl
from adapters import BitFit, Copy, Full, LoRA, Method, NormTuning, TargetError, TrainableTokens
from adapters.methods import METHODS
from adapters.targets.pattern import glob
from adapters.targets.selection import select
from tests.adapters.models import build, snapshot
from tests.thinned import examples
from tests.weights.fuzz import SECONDS, bounded


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.v_proj = nn.Linear(4, 4)
        self.dropout = nn.Dropout()


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.q_proj = nn.Conv2d(1, 1, 1)
        self.norm = nn.LayerNorm(4)
        self.gru = nn.GRU(4, 4)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.attn = Attention()
        self.lm_head = nn.Linear(4, 4)


EVERYTHING = [
    "layers.0.attn.q_proj",
    "layers.0.attn.v_proj",
    "layers.0.q_proj",
    "layers.1.attn.q_proj",
    "layers.1.attn.v_proj",
    "layers.1.q_proj",
    "attn.q_proj",
    "attn.v_proj",
]


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (None, None, EVERYTHING),
        (None, "q_proj", [path for path in EVERYTHING if path.endswith("v_proj")]),
        ("q_proj", None, [path for path in EVERYTHING if path.endswith("q_proj")]),
        ("attn.q_proj", None, [path for path in EVERYTHING if path.endswith("attn.q_proj")]),
        ("1.attn.q_proj", None, ["layers.1.attn.q_proj"]),
        ("lm_head", None, ["lm_head"]),
        (["v_proj", "lm_head"], "layers.0.**", ["layers.1.attn.v_proj", "attn.v_proj", "lm_head"]),
        ("**.attn.*", None, [path for path in EVERYTHING if "attn." in path]),
        ("layers.*.q_proj", None, ["layers.0.q_proj", "layers.1.q_proj"]),
        ("layers.1.**", None, EVERYTHING[3:6]),
        ("**_proj", None, EVERYTHING),
        ("**.q*", None, [path for path in EVERYTHING if path.endswith("q_proj")]),
        (re.compile(r"layers\.\d\.q_.*"), None, ["layers.0.q_proj", "layers.1.q_proj"]),
        (nn.Conv2d, None, ["layers.0.q_proj", "layers.1.q_proj"]),
        ([nn.Linear, nn.Conv2d], None, [*EVERYTHING, "lm_head"]),
        (lambda path, module: module.out_features == 4 if path == "attn.q_proj" else False, None, ["attn.q_proj"]),
    ],
)
def test_patterns(targets: object, exclude: object, expected: list[str]) -> None:
    model = Net()
    patch = adapters.inject(model, LoRA(rank=1), targets=targets, exclude=exclude)
    assert list(patch.targets) == expected


@pytest.mark.parametrize(
    ("targets", "exclude", "message"),
    [
        ("q_porj", None, "'q_porj' matches no layer; near it are 'q_proj'"),
        (["q_proj", "key"], None, "'key' matches no layer"),
        ("proj", None, "'proj' matches no layer; near it are"),
        ("q_proj", "v_porj", "'v_porj' matches no layer; near it are 'v_proj'"),
        ("attn.*.x", None, "matches no layer"),
        (re.compile("layers"), None, "selects no layer to adapt, .* such as layers"),
        ("**.norm", None, r"unsupported ones such as layers\.0\.norm \(LayerNorm\)"),
        ("norm", None, r"layers\.0\.norm is a LayerNorm, which LoRA cannot adapt"),
        ("attn", None, r"which LoRA cannot adapt: .* or choose what is in it by 'layers\.0\.attn\.\*\*'"),
        ("gru", None, r"layers\.0\.gru is a GRU, which LoRA cannot adapt"),
        ("lm_head", "lm_head", "selects no layer to adapt"),
        (3, None, "3 is no pattern"),
        (nn.Linear(2, 2), None, "A Linear is no pattern"),
        ([nn.Linear(2, 2)], None, "A Linear is no pattern"),
        ({"q_proj": 4}, None, "A mapping of patterns to methods takes the place of the method"),
        (nn.Conv3d, None, "matches no layer; the paths are such as 'attn"),
        (r"(q|v)_proj", None, r"if it is a regular expression, pass re\.compile\("),
        (".*_proj", None, r"if it is a regular expression, pass re\.compile\("),
        ("all-linear", None, r"'all-linear' matches no layer; .* leave targets= out or pass targets=torch\.nn\.Linear"),
    ],
)
def test_patterns_that_are_of_no_use(targets: object, exclude: object, message: str) -> None:
    model = Net()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        adapters.inject(model, LoRA(rank=1), targets=targets, exclude=exclude)
    assert snapshot(model) == before


def means(pattern: str, path: str) -> bool:
    """Whether a glob matches a path, by the definition."""
    tokens = re.findall(r"(?:^|(?<=\.))\*\*+\.|\*\*+|.", pattern)

    @cache
    def rest(token: int, at: int) -> bool:
        if token == len(tokens):
            return at == len(path)
        kind = tokens[token]
        if kind[:2] == "**":
            starts = range(at, len(path) + 1)
            after_dots = [at, *(place for place in starts if place > at and path[place - 1] == ".")]
            return any(rest(token + 1, place) for place in (after_dots if kind[-1] == "." else starts))
        if at < len(path) and kind in ("*", path[at]) and (kind != "*" or path[at] != "."):
            return rest(token + (kind != "*"), at + 1) or (kind == "*" and rest(token + 1, at))
        return kind == "*" and rest(token + 1, at)

    return rest(0, 0)


@examples(500, 2000)
@given(
    st.lists(st.sampled_from(["a", "b", ".", "*", "**", "**."]), max_size=8).map("".join), st.text("ab.", max_size=10)
)
def test_globs_mean_what_is_said(pattern: str, path: str) -> None:
    assert bool(glob(pattern).fullmatch(path)) == means(pattern, path)


@pytest.mark.parametrize("part", ["**a", "*a", "**.", "**.a", "*", "**a*", "a**.*a"])
def test_no_glob_takes_forever(part: str) -> None:
    model = nn.ModuleDict({"a" * 200: nn.Sequential(nn.Linear(2, 2))})
    with bounded(), pytest.raises(TargetError, match="matches no layer"):
        signal.alarm(SECONDS)
        try:
            adapters.inject(model, LoRA(rank=1), part * 60 + "b")
        finally:
            signal.alarm(0)


def test_the_first_pattern_that_can_adapt_a_layer_counts() -> None:
    model = Net()
    patch = adapters.inject(model, {"layers.0.**": LoRA(rank=1), "q_proj": LoRA(rank=2), "norm": NormTuning()})
    methods = {place.path: place.branch.method for place in patch.attachments}
    assert methods["layers.0.q_proj"] == LoRA(rank=1)
    assert methods["layers.1.q_proj"] == LoRA(rank=2)
    assert methods["layers.0.norm"] == NormTuning()


def test_a_pattern_that_others_leave_nothing_is_refused() -> None:
    model = Net()
    adapters.inject(model, {"q_proj": LoRA(rank=2), "**_proj": LoRA(rank=1)}).eject()
    adapters.inject(model, LoRA(rank=2), ["**_proj", "q_proj"]).eject()
    with pytest.raises(TargetError, match="'q_proj' is left without a layer by those before it: put it in front"):
        adapters.inject(model, {"**_proj": LoRA(rank=1), "q_proj": LoRA(rank=2)})
    with pytest.raises(TargetError, match="There are no patterns in the mapping"):
        adapters.inject(model, {})


class Parts(nn.Module):
    """Layers with and without biases, norms, a composite head, and parameters that are no module's `weight`."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.block = nn.ModuleDict(
            {"q": nn.Linear(4, 4, bias=False), "v": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "rms": nn.RMSNorm(4)}
        )
        self.attn = nn.MultiheadAttention(4, 2)
        self.gate = nn.Parameter(torch.ones(4))
        self.classifier = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


BIASES = ["block.v.bias", "block.norm.bias", "attn.in_proj_bias", "attn.out_proj.bias"]
NORMS = ["block.norm", "block.norm.bias", "block.rms"]
HEAD_NORM = ["classifier.1", "classifier.1.bias"]
HEAD = ["classifier.0", "classifier.0.bias", *HEAD_NORM, "classifier.2", "classifier.2.bias"]
HEAD_BIASES = [path for path in HEAD if path.endswith("bias")]


@pytest.mark.parametrize(
    ("method", "targets", "exclude", "expected"),
    [
        (BitFit(), None, None, BIASES + HEAD_BIASES),
        (BitFit(), None, ["classifier.*", "norm"], [path for path in BIASES if "norm" not in path]),
        (BitFit(), "v", None, ["block.v.bias"]),
        (BitFit(), ["v", "attn"], None, ["block.v.bias", "attn.in_proj_bias"]),
        (BitFit(), "in_proj_bias", None, ["attn.in_proj_bias"]),
        (BitFit(), "v.bias", None, ["block.v.bias"]),
        (BitFit(), "block.**", None, BIASES[:2]),
        (BitFit(), "**", nn.Linear, ["block.norm.bias", "attn.in_proj_bias", *HEAD_NORM[1:]]),
        (BitFit(), re.compile(r".*\.[02]"), None, ["classifier.0.bias", "classifier.2.bias"]),
        (BitFit(), re.compile(r".*\.v\.bias"), None, ["block.v.bias"]),
        (BitFit(), nn.LayerNorm, None, ["block.norm.bias"]),
        (BitFit(), lambda path, module: isinstance(module, nn.Linear) and "block" in path, None, ["block.v.bias"]),
        (NormTuning(), None, None, NORMS + HEAD_NORM),
        (NormTuning(), "norm", None, NORMS[:2]),
        (NormTuning(), "norm.bias", None, ["block.norm.bias"]),
        (NormTuning(), "block.*", nn.LayerNorm, ["block.rms"]),
        (NormTuning(), nn.BatchNorm1d, None, HEAD_NORM),
        (NormTuning(), None, "**.norm", ["block.rms", *HEAD_NORM]),
        (Copy(), "classifier", None, HEAD),
        (Copy(), "classifier", nn.BatchNorm1d, [path for path in HEAD if path not in HEAD_NORM]),
        (Copy(), "classifier", "0.bias", [path for path in HEAD if path != "classifier.0.bias"]),
        (Copy(), nn.Embedding, None, ["embed"]),
        (Copy(), nn.Sequential, None, HEAD),
        (Copy(), "attn", None, ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj", "attn.out_proj.bias"]),
        (Copy(), re.compile("block"), None, ["block.q", "block.v", "block.v.bias", *NORMS]),
        (Full(), "v", None, ["block.v"]),
        (Full(bias=True), "block.**", "rms", ["block.q", "block.v", "block.v.bias", *NORMS[:2]]),
        (TrainableTokens((1,)), "embed", None, ["embed"]),
    ],
)
def test_what_methods_choose(method: Method, targets: object, exclude: object, expected: list[str]) -> None:
    model = Parts()
    before = snapshot(model)
    patch = adapters.inject(model, method, targets=targets, exclude=exclude)
    assert [place.path for place in patch.attachments] == expected
    patch.eject()
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("method", "targets", "message"),
    [
        (BitFit(), "q", r"'q' selects only layers that have no parameter for BitFit, such as block\.q \(Linear\)"),
        (BitFit(), ["v", "rms"], r"'rms' selects only .* such as block\.rms \(RMSNorm\)"),
        (BitFit(), nn.Embedding, r"selects only .* such as embed \(Embedding\)"),
        (BitFit(), "block.q.bias", r"'block\.q\.bias' matches no layer; near it are"),
        (BitFit(), "x", "matches no layer"),
        (NormTuning(), "q", r"block\.q is a Linear, which NormTuning cannot adapt"),
        (NormTuning(), nn.Linear, "selects no layer to adapt, only excluded or unsupported ones"),
        (Copy(), None, "Copy would copy the whole model: name the modules with targets="),
        (Copy(), "head", "matches no layer"),
        (TrainableTokens((1,)), None, "does not say which are its input embeddings: name them with targets="),
        (TrainableTokens((1,)), "norm", r"block\.norm is a LayerNorm, which TrainableTokens cannot adapt"),
        (TrainableTokens((1, 5)), "embed", "embed has 5 rows, and none for the token 5: resize the embedding first"),
    ],
)
def test_what_methods_cannot_choose_is_said(method: Method, targets: object, message: str) -> None:
    model = Parts()
    before = snapshot(model)
    with pytest.raises(TargetError, match=message):
        adapters.inject(model, method, targets=targets)
    assert snapshot(model) == before


def test_nothing_of_a_module_is_left_out_of_its_copy() -> None:
    with pytest.raises(TargetError, match=r"layers\.0\.gru.* is a GRU, which Copy cannot adapt"):
        adapters.inject(Net(), Copy(), "layers.0")


def test_layers_of_one_parameter_come_together_where_a_method_sees_them_alike() -> None:
    """An embedding and a head see it transposed: a LoRA at one is not at the other, rows are those of both."""
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    alike: list[tuple[Method, str, str | None, list[str]]] = [
        (LoRA(rank=1), "embed", None, ["embed"]),
        (TrainableTokens((1,)), "embed", None, ["embed", "head"]),
        (TrainableTokens((1,)), "head", None, ["embed", "head"]),
        (TrainableTokens((1,)), "embed", "head", ["embed"]),
        (Copy(), "embed", None, ["embed", "head"]),
        (Full(), "head", None, ["embed", "head"]),
    ]
    for method, target, exclude, expected in alike:
        patch = adapters.inject(model, method, target, exclude)
        assert [place.path for place in patch.attachments] == expected
        assert len(list(patch.parameters())) == 1 + (method == LoRA(rank=1))
        patch.eject()


def test_a_mapping_gives_layers_their_own_methods() -> None:
    rules = {"attn.q_proj": LoRA(rank=2), nn.Conv2d: LoRA(rank=1), "**_proj": LoRA(rank=3)}
    model = Net()
    patch = adapters.inject(model, rules)
    ranks = {name: len(value) for name, value in patch.state_dict().items() if "lora_A" in name}
    assert ranks == {
        f"{path}.lora_A.weight": 2 if path.endswith("attn.q_proj") else 1 if path.endswith("q_proj") else 3
        for path in EVERYTHING
    }
    with pytest.raises(TargetError, match="twice"):
        adapters.inject(Net(), rules, targets="q_proj")


def test_a_layer_with_two_names_answers_to_both() -> None:
    case = build("plain")
    assert list(adapters.inject(case.model, LoRA(rank=1), targets="alias").targets) == ["steps.0"]


def test_layers_inside_patches_are_not_targets() -> None:
    model = fl.Chain(fl.Linear(3, 3), fl.Chain(fl.Linear(3, 3)))
    adapters.inject(model, LoRA(rank=1), name="first")
    second = adapters.inject(model, LoRA(rank=1), targets=nn.Linear, name="second")
    assert list(second.targets) == ["Linear", "Chain.Linear"]


def test_the_output_embeddings_of_transformers_are_left_out() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=11, **sizes))
    assert not any("lm_head" in path for path in adapters.inject(llama, LoRA(rank=1)).targets)
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2))
    paths = list(adapters.inject(gpt, LoRA(rank=1)).targets)
    assert "transformer.h.0.attn.c_attn" in paths
    assert "lm_head" not in paths
    with pytest.raises(TargetError, match="no layer that LoRA supports besides its output head"):
        adapters.inject(nn.Sequential(nn.LayerNorm(3)), LoRA(rank=1))


NEEDED = {"TrainableTokens": {"tokens": (1,)}}


@pytest.mark.parametrize("method", METHODS.values(), ids=lambda method: method.__name__)
def test_methods_check_the_type_of_their_numbers(method: type[Method]) -> None:
    """Whatever is no yes or no is refused where it is no number, name or tuple of the kind that is asked for."""
    needed = NEEDED.get(method.__name__, {})
    for field in dataclasses.fields(method):
        if "bool" in str(field.type):
            continue
        for wrong in ("many", ["many"], {}, *([True] if field.name == "rank" else [])):
            with pytest.raises(adapters.AdapterError, match=f"^{method.__name__} needs .* not "):
                method(**{**needed, field.name: wrong})


def test_methods_check_their_numbers() -> None:
    wrong = ({"rank": 0}, {"rank": -1}, {"rank": 1.5}, {"dropout": 1.0}, {"dropout": -0.1}, {"alpha": float("nan")})
    for numbers in (*wrong, {"alpha": "8"}):
        with pytest.raises(adapters.AdapterError, match=r"LoRA needs an? .* not"):
            LoRA(**numbers)


@pytest.mark.parametrize(
    ("model", "method", "targets", "message"),
    [
        (nn.Linear(2, 2), LoRA(rank=1), None, "This Linear has no layers below it: put it inside another module"),
        (Net(), LoRA, None, "is no method: pass one with its numbers"),
        (Net(), {"q_proj": "lora"}, None, "'lora' is no method"),
        (Net(), LoRA(rank=1), [], "There are no targets in the list"),
        (None, LoRA(rank=1), None, "A NoneType is no model"),
    ],
)
def test_what_cannot_be_injected_is_said(model: nn.Module, method: object, targets: object, message: str) -> None:
    with pytest.raises(adapters.AdapterError, match=message):
        adapters.inject(model, method, targets)


def test_a_selection_prints_what_is_chosen() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "norm": nn.LayerNorm(4), "head": nn.Linear(4, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    selection = select(model, {"embed": Full(), "norm": NormTuning()}, None)
    assert len(selection) == 3 and [target.path for target in selection.targets] == [
        *("embed", "head", "norm", "norm.bias")
    ]
    assert str(selection).splitlines() == [
        "Selection of 4 targets",
        "  path       layer      method",
        "  embed      Embedding  Full()",
        "  head       Linear     tied to embed",
        "  norm       LayerNorm  NormTuning()",
        "  norm.bias  LayerNorm  NormTuning()",
    ]
