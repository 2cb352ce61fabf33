"""Faults that were measured in PEFT 0.21, and what happens here instead.

What other tests show in full is not repeated: identity at the start, dilation, padding modes, `max_norm`, layers with
a forward of their own, weight norm (`tests/adapters/test_layers.py`); modules under two names and tied weights,
base keys, failing injections, modes, names with a dot (`test_patch.py`, `test_sequences.py`); cycles of merging in
half precision (`test_merge.py`); names that match nothing (`test_targets.py`).
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters import AdapterError, LoRA, Patch
from tests.adapters.models import perturb, snapshot


def inject(model: nn.Module, name: str = "default", targets: object = None, seed: int = 1, **options: object) -> Patch:
    patch = adapters.inject(model, LoRA(rank=2, alpha=4), targets, name=name, **options)
    perturb(patch, seed)
    return patch


def delta(patch: Patch, path: str) -> Tensor:
    """`s B A` of one layer, by hand."""
    state = patch.state_dict()
    return 2 * state[f"{path}.lora_B.weight"] @ state[f"{path}.lora_A.weight"]


# 1, 2: attention


@pytest.mark.parametrize("target", ["linear1", "linear2", "out_proj", "in_proj_weight"])
@pytest.mark.parametrize("nested", [False, True])
def test_the_fast_path_of_an_encoder_does_not_skip_the_adapter(target: str, nested: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=nested), torch.randn(3, 4, 8)
    mask = torch.tensor([[False] * 4, [False] * 4, [False, False, True, True]])
    padding = {"src_key_padding_mask": mask} if nested else {}
    patch = inject(model, targets=target)
    with torch.no_grad():
        model.train()
        slow = model(x, **padding)
        model.eval()
        with adapters.use(model):
            base = model(x, **padding)
        fast = model(x, **padding)
        assert not torch.allclose(fast, base, atol=1e-3)
        kept = ~mask if nested else torch.ones_like(mask)  # Nested tensors leave zeros where the padding is.
        torch.testing.assert_close(fast[kept], slow[kept], rtol=1e-4, atol=1e-5)
        patch.merge_and_eject()
        torch.testing.assert_close(model(x, **padding)[kept], fast[kept], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("target", ["out_proj", "in_proj_weight", "attention", nn.MultiheadAttention])
def test_attention_has_each_update_once(target: object) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)})
    x = torch.randn(3, 4, 8)
    patch = inject(model, targets=target)
    found = model["attention"](x, x, x)[0]
    deltas = {path: delta(patch, path) for path in patch.targets}
    patch.eject()
    attention = model["attention"]
    with torch.no_grad():
        for path, update in deltas.items():
            weight = attention.out_proj.weight if "out_proj" in path else attention.in_proj_weight
            weight += update
    torch.testing.assert_close(found, attention(x, x, x)[0], rtol=1e-4, atol=1e-5)


def test_attention_is_not_written_by_its_forward_nor_by_threads() -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=True)}).to(torch.bfloat16)
    x = torch.randn(3, 4, 8, dtype=torch.bfloat16)
    before = snapshot(model)
    patch = inject(model)
    versions = [parameter._version for parameter in model.parameters()]

    def work() -> None:
        for _ in range(50):
            with torch.no_grad():
                model["attention"](x, x, x)

    together([work] * 3)
    assert [parameter._version for parameter in model.parameters()] == versions
    patch.eject()
    assert snapshot(model) == before


# 3: rows


@pytest.mark.parametrize("merged", [False, True])
def test_rows_have_the_adapters_they_name(merged: bool) -> None:
    model = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 8), nn.Flatten(0, 0), nn.Conv1d(4, 4, 3))
    x = torch.randint(0, 7, (4, 4))
    patches = [inject(model, name, seed=seed) for seed, name in enumerate("ab")]
    if merged:
        patches[0].merge()
    expected = []
    for row, choice in enumerate([("a",), (), ("b",), ("a", "b")]):
        with adapters.use(model, *choice):
            expected.append(model(x)[row])
    with adapters.use(model, rows=["a", None, "b", ("a", "b")]):
        torch.testing.assert_close(model(x), torch.stack(expected), rtol=1e-5, atol=1e-5)


# 5: shared weights


class Tied(nn.Module):
    """A language model whose head reads the weight of its embedding."""

    def __init__(self, reads: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.reads = reads

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.embed(x).tanh()
        return nn.functional.linear(hidden, self.embed.weight) if self.reads else self.head(hidden)


@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("targets", ["embed", "head", ["embed", "head"]])
def test_tied_weights_have_each_update_once(reads: bool, targets: object) -> None:
    model, x = Tied(reads), torch.tensor([[1, 2, 3]])
    before, base = snapshot(model), model(x)
    patch = inject(model, targets=targets)
    found = model(x)
    assert torch.equal(found, base) == (reads and targets == "head")  # That layer is never asked.
    patch.merge()
    torch.testing.assert_close(model(x), found)
    patch.eject()
    assert snapshot(model) == before


# 6, 7: merging


@pytest.mark.parametrize("rslora", [False, True])
def test_two_adapters_merge_to_what_they_are_together(rslora: bool) -> None:
    model, x = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double(), torch.randn(3, 6).double()
    for seed, name in enumerate("ab"):
        perturb(adapters.inject(model, LoRA(3, 5.0, rslora=rslora), name=name), seed, std=1.0)
    found = model(x)
    for patch in list(adapters.patches(model).values()):
        patch.merge_and_eject()
    torch.testing.assert_close(model(x), found, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("edit", ["scale", "values", "enabled", "other patch", "gradients"])
def test_unmerging_restores_every_bit_whatever_was_edited(edit: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(torch.bfloat16)
    before = snapshot(model)
    patch = inject(model)
    patch.merge()
    if edit == "scale":
        patch.scale = 0.25
    elif edit == "values":
        perturb(patch, 5)
    elif edit == "enabled":
        patch.enabled = False
    elif edit == "other patch":
        inject(model, "other").merge()
    else:
        model(torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    patch.unmerge()
    for each in adapters.patches(model).values():
        each.eject()
    assert snapshot(model) == before


@pytest.mark.parametrize("merged", [False, True])
def test_a_model_that_is_left_is_what_it_was(merged: bool) -> None:
    """No parameter stays frozen, and no update stays in."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).train()
    model[1].bias.requires_grad_(False)
    before = snapshot(model)
    patch = inject(model)
    if merged:
        patch.merge()
    patch.eject()
    assert snapshot(model) == before


# 8, 9: injecting


def test_a_patch_that_does_not_act_lets_no_gradient_through() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    patch = inject(model)
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with adapters.use(model):
        assert not model(x).requires_grad
        assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    patch.enabled = False
    assert not model(x).requires_grad
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags


@pytest.mark.parametrize("target", [["0", "1.lienar"], ["0", "2.**"], "0.weight.x"])
def test_one_wrong_name_of_several_is_an_error(target: object) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ModuleDict({"linear": nn.Linear(4, 4)}))
    before = snapshot(model)
    with pytest.raises(AdapterError, match="matches no layer"):
        adapters.inject(model, LoRA(rank=1), target)
    assert snapshot(model) == before


def test_a_name_that_is_in_use_does_not_lose_its_weights(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    patch = inject(model, "style.v1")
    values = {key: value.clone() for key, value in patch.state_dict().items()}
    saved = patch.save_pretrained(tmp_path)
    for call in (
        lambda: adapters.inject(model, LoRA(rank=1), name="style.v1"),
        lambda: adapters.load(model, saved, name="style.v1"),
    ):
        with pytest.raises(AdapterError, match=r"has a patch 'style\.v1' already"):
            call()
    assert all(torch.equal(patch.state_dict()[key], value) for key, value in values.items())
    with adapters.use(model, "style.v1"):
        model(torch.randn(1, 4))


# 10: keys


def test_the_state_dict_of_the_base_loads_strictly() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    saved = {key: value.clone() for key, value in model.state_dict().items()}
    inject(model)
    assert saved.keys() < model.state_dict().keys()
    assert model.load_state_dict(saved).missing_keys == []


# 11: threads and tasks

COUNT, CALLS = 8, 1000


@pytest.fixture
def eight() -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A model with eight patches, an input, and what each patch makes of it."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(2, 4)
    expected = []
    for number in range(COUNT):
        inject(model, str(number), seed=number)
        with torch.no_grad(), adapters.use(model, str(number)):
            expected.append(model(x))
    assert len({tuple(output.flatten().tolist()) for output in expected}) == COUNT
    return model, x, expected


def together(tasks: list[Callable[[], None]]) -> None:
    """Run functions in threads of their own that start at once; what one raises is raised here."""
    start, raised = threading.Barrier(len(tasks)), []

    def run(task: Callable[[], None]) -> None:
        try:
            start.wait()
            task()
        except BaseException as problem:
            raised.append(problem)

    threads = [threading.Thread(target=run, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


@pytest.mark.parametrize("merged", [False, True])
def test_eight_threads_with_eight_adapters(eight: tuple[nn.Module, Tensor, list[Tensor]], merged: bool) -> None:
    model, x, expected = eight
    right = [0] * COUNT
    if merged:  # The others work past it: each computes with weights of its own.
        adapters.patches(model)["0"].merge()

    def work(number: int) -> None:
        for _ in range(CALLS // 10 if merged else CALLS):
            with torch.no_grad(), adapters.use(model, str(number)):
                output = model(x)
            same = torch.allclose(output, expected[number], atol=1e-6) if merged else output.equal(expected[number])
            right[number] += same

    together([lambda number=number: work(number) for number in range(COUNT)])
    assert right == [CALLS // 10 if merged else CALLS] * COUNT


def test_eight_tasks_with_eight_adapters(eight: tuple[nn.Module, Tensor, list[Tensor]]) -> None:
    model, x, expected = eight
    right = [0] * COUNT

    async def work(number: int) -> None:
        for _ in range(CALLS):
            with adapters.use(model, str(number)):
                await asyncio.sleep(0)  # The others come in between, with choices of their own.
                with torch.no_grad():
                    right[number] += model(x).equal(expected[number])

    async def main() -> None:
        await asyncio.gather(*(work(number) for number in range(COUNT)))

    asyncio.run(main())
    assert right == [CALLS] * COUNT


def test_threads_train_adapters_of_their_own() -> None:
    """Each with its own optimizer, on one base: as if it were alone."""
    model, x = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), torch.randn(2, 4)

    def train(patch: Patch) -> None:
        optimizer = torch.optim.SGD(patch.parameters(), lr=0.1)
        for _ in range(30):
            with adapters.use(model, patch.name):
                optimizer.zero_grad()
                model(x).square().mean().backward()
                optimizer.step()

    alone = [inject(model, f"alone{number}", seed=number) for number in range(4)]
    for patch in alone:
        train(patch)
    side_by_side = [inject(model, f"thread{number}", seed=number) for number in range(4)]
    together([lambda patch=patch: train(patch) for patch in side_by_side])
    for one, other in zip(alone, side_by_side, strict=True):
        for key, value in one.state_dict().items():
            torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-6, atol=1e-7)


# 13: copies


def test_a_copy_runs_with_weights_of_its_own() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    patch = inject(model)
    clone, expected = copy.deepcopy(model), model(x)
    perturb(patch, 9)
    with torch.no_grad():
        model[0].base.weight.zero_()
    assert torch.equal(clone(x), expected)
