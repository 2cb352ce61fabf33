"""Compiled models: one whole graph, whatever is chosen afterwards, wherever and however it is chosen."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from transformers import LlamaConfig, LlamaModel

import adapters
import fluxion as fl
from adapters import LoRA, Method, RowsError
from tests.adapters.models import perturb


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.mix = nn.Conv1d(8, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.out(torch.relu(self.mix(self.tokens(tokens).mT)).mT)


TOKENS = torch.arange(12).view(3, 4)


def model(*methods: Method) -> nn.Module:
    torch.default_generator.manual_seed(0)
    made = Model().eval()
    for number, method in enumerate(methods or (LoRA(rank=2, alpha=3), LoRA(rank=1))):
        perturb(adapters.inject(made, method, name="ab"[number]), seed=number)
    return made


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def compiled(module: nn.Module, counter: Any, **options: Any) -> Any:
    return torch.compile(module, fullgraph=True, backend=counter, **options)


def test_one_graph_for_every_choice() -> None:
    made, counter = model(), CompileCounter()
    run = compiled(made, counter)
    patch, other = (adapters.patches(made)[name] for name in "ab")

    def check() -> Tensor:
        found = run(TOKENS)
        close(found, made(TOKENS))
        return found

    seen = [check()]
    patch.enabled = False
    seen.append(check())
    patch.enabled, patch.scale = True, 0.25
    seen.append(check())
    other.scale = -1.5
    seen.append(check())
    for choice in ([], "a", ["a", "b"], {"b": 0.5}):
        with adapters.use(made, choice) if choice else adapters.use(made):
            seen.append(check())
    for rows in (["a", "b", None], [None, "a", {"a": 0.5, "b": 2.0}], ["b", "b", "b"]):
        with adapters.use(made, rows=rows):
            seen.append(check())
    patch.load_state_dict({name: value * 2 for name, value in patch.state_dict().items()})
    seen.append(check())
    made.load_state_dict({name: value * 0.5 for name, value in made.state_dict().items()})
    seen.append(check())
    assert counter.frame_count == 1
    assert all(not torch.allclose(one, two) for number, one in enumerate(seen[:4]) for two in seen[:number])


def test_threads_have_choices_of_their_own() -> None:
    made, counter = model(), CompileCounter()
    run = compiled(made, counter)
    choices = ["a", "b", ["a", "b"]]
    expected = []
    for choice in choices:
        with adapters.use(made, choice):
            expected.append(made(TOKENS))
            run(TOKENS)
    barrier, found = threading.Barrier(3), {}

    def work(number: int) -> None:
        with adapters.use(made, choices[number]):
            for _ in range(5):
                barrier.wait(timeout=60)
                found[number] = run(TOKENS)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    close([found[number] for number in range(3)], expected)
    assert counter.frame_count == 1


LAYERS: dict[str, tuple[nn.Module, Tensor]] = {
    "linear": (nn.Linear(6, 5), torch.randn(3, 6)),
    "linear, tokens": (nn.Linear(6, 5, bias=False), torch.randn(3, 2, 4, 6)),
    "linear of a tree": (fl.Linear(6, 5), torch.randn(3, 2, 6)),
    "linear, double": (nn.Linear(6, 5, dtype=torch.float64), torch.randn(3, 6, dtype=torch.float64)),
    "linear, bfloat16": (nn.Linear(6, 5, dtype=torch.bfloat16), torch.randn(3, 6).bfloat16()),
    "conv1d": (nn.Conv1d(4, 6, 3), torch.randn(3, 4, 8)),
    "conv2d": (nn.Conv2d(4, 6, (3, 1), stride=2, padding=1), torch.randn(3, 4, 8, 8)),
    "grouped conv2d": (nn.Conv2d(4, 6, 3, groups=2), torch.randn(3, 4, 8, 8)),
    "embedding": (nn.Embedding(20, 6), torch.randint(20, (3, 4))),
    "embedding, one token": (nn.Embedding(20, 6), torch.randint(20, (3,))),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str) -> None:
    layer, x = LAYERS[name]
    made, counter = nn.Sequential(copy.deepcopy(layer)), CompileCounter()
    for patch in "ab":
        perturb(adapters.inject(made, LoRA(rank=2, alpha=3), name=patch), seed=ord(patch))
    run = compiled(made, counter)
    close_here = torch.testing.assert_close if x.dtype != torch.bfloat16 else _roughly
    for choice in (["a", "b"], ["b"], []):
        with adapters.use(made, choice):
            close_here(run(x), made(x))
    with adapters.use(made, rows=["b", None, {"a": 0.5, "b": 1.0}]):
        close_here(run(x), made(x))
    assert counter.frame_count == 1


def _roughly(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0.03)


ONE_GRAPH = [
    LoRA(rank=2),
    LoRA(rank=2, dropout=0.5),
    adapters.VeRA(rank=2),
    adapters.IA3(),
]


@pytest.mark.parametrize("method", ONE_GRAPH, ids=str)
def test_methods_that_run_beside_the_layer(method: Method) -> None:
    made, counter = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)), CompileCounter()
    perturb(adapters.inject(made, method, targets=["0", "2"], name="a"))
    made.eval()
    run, x = compiled(made, counter), torch.randn(3, 6)
    for choice in ("a", {"a": 0.5}, []):
        with adapters.use(made, choice):
            close(run(x), made(x))
    assert counter.frame_count == 1


BREAKING = [adapters.DoRA(rank=2), adapters.Bottleneck(2)]


@pytest.mark.parametrize("method", BREAKING, ids=str)
def test_methods_that_change_weights_are_as_right_with_breaks(method: Method) -> None:
    made = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    perturb(adapters.inject(made, method, targets=["0", "2"], name="a"))
    run, x = torch.compile(made, backend="eager"), torch.randn(3, 6)
    for choice in ("a", {"a": 0.5}, []):
        with adapters.use(made, choice):
            close(run(x), made(x))
    if method.mergeable:
        adapters.patches(made)["a"].merge()
    close(run(x), made(x))


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("rows", [None, ["a", None, "b"]])
def test_gradients_are_those_of_eager(backend: str, rows: Any) -> None:
    made = model()
    run = torch.compile(made, fullgraph=True, backend=backend)

    def gradients(call: Any) -> list[Tensor]:
        with adapters.use(made, rows=rows) if rows else adapters.use(made, ["a", "b"]):
            loss = call(TOKENS).square().sum()
            trained = [parameter for parameter in made.parameters() if parameter.requires_grad]
            return list(torch.autograd.grad(loss, trained))

    found, expected = gradients(run), gradients(made)
    assert len(expected) == 12
    close(found, expected)


def test_a_transformer() -> None:
    torch.default_generator.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    made, counter = LlamaModel(config).eval(), CompileCounter()
    for name in "ab":
        perturb(adapters.inject(made, LoRA(rank=2), name=name), seed=ord(name))
    run = compiled(made, counter)

    def check() -> None:
        found, expected = (call(TOKENS, use_cache=False).last_hidden_state for call in (run, made))
        close(found, expected)

    with torch.no_grad():
        check()
        for choice in ("a", {"b": 0.5}, []):
            with adapters.use(made, choice):
                check()
        with adapters.use(made, rows=["b", None, "a"]):
            check()
    assert counter.frame_count == 1


def test_copies_of_a_model_have_choices_of_their_own() -> None:
    made, counter = model(), CompileCounter()
    run = compiled(made, counter)
    run(TOKENS)
    twin = copy.deepcopy(made)
    twin_run = compiled(twin, counter)
    adapters.patches(twin)["a"].scale = 3.0
    adapters.patches(made)["b"].enabled = False
    close(run(TOKENS), made(TOKENS))
    close(twin_run(TOKENS), twin(TOKENS))
    assert not torch.allclose(made(TOKENS), twin(TOKENS))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.inside(x))


def test_equal_blocks_share_one_graph() -> None:
    """Though each has strengths of its own; more of them than torch makes graphs for."""
    made, counter = nn.Sequential(*(Block() for _ in range(12))), CompileCounter()
    for name in "ab":
        perturb(adapters.inject(made, LoRA(rank=2), targets=["inside"], name=name), seed=ord(name))
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = made(x)
        for block in made:
            block.compile(fullgraph=True, backend=counter)
        close(made(x), expected)
        adapters.patches(made)["a"].scale = 0.5
        found = made(x)
        for block in made:
            block._compiled_call_impl = None
        close(found, made(x))
    assert counter.frame_count == 1


def test_equal_blocks_with_unequal_patches() -> None:
    """What one graph looks up for a block is what acts on that block."""
    made = nn.Sequential(Block(), Block())
    for number in range(2):
        patch = adapters.inject(made, LoRA(rank=2), targets=[f"{number}.inside"], name="ab"[number])
        perturb(patch, seed=number)
    x = torch.randn(3, 6)
    with torch.no_grad():
        expected = {}
        for choice in "ab":
            with adapters.use(made, choice):
                expected[choice] = made(x)
        for block in made:
            block.compile(fullgraph=True, backend="eager")
        for choice in "ab":
            with adapters.use(made, choice):
                close(made(x), expected[choice])


def test_another_number_of_rows() -> None:
    made = model()
    run = torch.compile(made, fullgraph=True, backend="eager")
    with (
        adapters.use(made, rows=["a", "b"]),
        pytest.raises(RowsError, match=r"has 2 entries for a batch of 3") as caught,
    ):
        run(TOKENS)
    assert caught.value.path in {"tokens", "mix", "out"}
    close(run(TOKENS), made(TOKENS))


def test_patches_that_come_and_go() -> None:
    made = model()
    run = torch.compile(made, fullgraph=True, backend="eager")
    close(run(TOKENS), made(TOKENS))
    third = adapters.inject(made, LoRA(rank=3), name="c")
    perturb(third, seed=7)
    with adapters.use(made, ["a", "c"]):
        close(run(TOKENS), made(TOKENS))
    for patch in list(adapters.patches(made).values()):
        patch.eject()
        close(run(TOKENS), made(TOKENS))


def test_batches_of_other_sizes() -> None:
    made = nn.Sequential(nn.Linear(6, 6))
    for name in "ab":
        perturb(adapters.inject(made, LoRA(rank=2), name=name), seed=ord(name))
    run = torch.compile(made, fullgraph=True, backend="eager", dynamic=True)
    for size in (3, 2, 7):
        tokens = torch.randn(size, 6)
        with adapters.use(made, rows=["a", *[None] * (size - 2), "b"]):
            close(run(tokens), made(tokens))


def test_what_is_exported_needs_no_patch() -> None:
    made = model()
    adapters.patches(made)["a"].scale = 0.5
    program = torch.export.export(made, (TOKENS,), strict=False)
    assert not any("strengths" in str(node.target) for node in program.graph.nodes)
    close(program.module()(TOKENS), made(TOKENS))
