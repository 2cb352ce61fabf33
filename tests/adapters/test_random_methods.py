"""Methods, layers and numbers drawn at random: starts, gradients, stacks of two methods, patterns of ranks, files."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapters
from adapters import Method, TargetError
from adapters.methods import METHODS
from tests.adapters.test_methods import perturb
from tests.thinned import examples

# What to draw a hyperparameter from, by its name, or by the key of the method and its name.
NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "rank": st.integers(1, 4),
    "alpha": st.none() | st.floats(0.5, 8.0),
    "rslora": st.booleans(),
    "bias": st.booleans(),
    "init": st.sampled_from(["kaiming", "gaussian", "pissa", "olora"]),
    "factor": st.sampled_from([-1, 2]),
    "decompose_both": st.booleans(),
    "feedforward": st.booleans(),
    "parallel": st.booleans(),
    "block_size": st.sampled_from([2, 4]),
    "blocks": st.just(0),
    "rescale": st.booleans(),
    "cayley_neumann": st.booleans(),
    "block_share": st.booleans(),
    "boundary": st.floats(1.0, 20.0),
    "group_size": st.sampled_from([2, 4]),
    "variant": st.sampled_from(["road_1", "road_2", "road_4"]),
    "n_frequency": st.integers(1, 4),
    "num_vectors": st.integers(3, 6),
    "vector_length": st.sampled_from([1, 2, 4]),
    "topk": st.integers(1, 3),
    "size": st.integers(1, 4),
    "config_a_b": st.sampled_from(["lora", "vector", "constant", "none"]),
    "config_c": st.sampled_from(["lora", "vector", "none"]),
    "config_d_e": st.sampled_from(["constant", "vector", "none"]),
    "output-boft.factors": st.just(1),
    "gralora.blocks": st.sampled_from([1, 2]),
    "hra.rank": st.sampled_from([2, 4]),
    "randlora.alpha": st.floats(0.5, 8.0),
    "shira.rank": st.just(1),
    "shira.seed": st.integers(0, 9),
}
# Methods that adapt none of the layers below, or not without naming what.
ELSEWHERE = {"prefix_tuning", "prompt_tuning", "trainable_tokens"}
# Methods whose layers share tensors, of which a file holds one set.
SHARING = {"randlora", "vblora", "vera"}
# How far a start may be off the identity, where the method's paper has it start beside it.
OFF = {"vblora": 0.05}


@st.composite
def methods(draw: st.DrawFn) -> Method:
    kind = METHODS[draw(st.sampled_from(sorted(METHODS.keys() - ELSEWHERE)))]
    numbers = {}
    for field in fields(kind):
        strategy = NUMBERS.get(f"{kind.key}.{field.name}", NUMBERS.get(field.name))
        if strategy is not None:
            numbers[field.name] = draw(strategy)
    try:
        return kind(**numbers)
    except adapters.AdapterError:
        assume(False)
        raise


@st.composite
def nets(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    """A convolution and two linear layers of random shapes, or an embedding and a linear layer, and an input."""
    width, hidden = 4 * draw(st.integers(1, 3)), 4 * draw(st.integers(1, 3))
    if draw(st.booleans()):
        rows, size = draw(st.integers(5, 9)), draw(st.integers(1, 4))
        net = nn.Sequential(nn.Embedding(rows, width), nn.Tanh(), nn.Linear(width, hidden, bias=draw(st.booleans())))
        return net.double(), torch.randint(0, rows, (3, size))
    groups = draw(st.sampled_from([1, 2, 4]))
    conv = nn.Conv2d(
        4 * groups,
        width * groups,
        (draw(st.integers(1, 3)), draw(st.integers(1, 3))),
        stride=draw(st.integers(1, 2)),
        padding=draw(st.integers(0, 2)),
        dilation=draw(st.integers(1, 2)),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "circular"])),
    )
    net = nn.Sequential(
        conv, nn.Tanh(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width * groups, hidden), nn.LayerNorm(hidden)
    )
    return net.double(), torch.randn(3, 4 * groups, 7, 8, dtype=torch.float64)


def inject(net: nn.Module, method: Method | dict[Any, Method], name: str) -> adapters.Patch:
    """The patch, on every layer that the method supports."""
    kinds: list[Callable[..., bool]] = [lambda path, module: not isinstance(module, nn.Sequential)]
    try:
        return adapters.inject(net, method, None if isinstance(method, dict) else kinds, name=name, seed=1)
    except TargetError:
        assume(False)
        raise


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@examples(40, 150)
@given(methods(), nets())
def test_starts_and_gradients(method: Method, case: tuple[nn.Module, Tensor]) -> None:
    net, x = case
    base = net(x).detach()
    patch = inject(net, method, "a")
    off = OFF.get(method.key, 1e-12)
    torch.testing.assert_close(net(x), base, rtol=off, atol=off)
    perturb(patch, 1)
    net(x).square().sum().backward()
    for name, parameter in patch.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@examples(40, 150)
@given(methods(), methods(), nets(), st.floats(-1.5, 1.5))
def test_stacks_of_two_methods_merge_to_what_they_compute(
    first: Method, second: Method, case: tuple[nn.Module, Tensor], scale: float
) -> None:
    net, x = case
    base = net(x).detach()
    patches = [inject(net, first, "a"), inject(net, second, "b")]
    for number, patch in enumerate(patches):
        perturb(patch, number)
    patches[1].scale = scale
    expected = net(x).detach()
    assume(expected.abs().max() < 1e6)
    mergeable = [patch for patch in patches if all(place.branch.changes for place in patch.attachments)]
    for order in (mergeable, mergeable[::-1]):
        for patch in order:
            patch.merge()
            close(net(x), expected)
        for patch in order:
            patch.unmerge()
        assert torch.equal(net(x), expected)
    for patch in patches:
        patch.eject()
    assert torch.equal(net(x), base)


@examples(30, 100)
@given(methods(), methods(), nets())
def test_patterns_give_layers_their_own_numbers_and_files_keep_them(
    first: Method, second: Method, case: tuple[nn.Module, Tensor]
) -> None:
    assume(first == second or first.key != second.key or first.key not in SHARING)
    net, x = case
    twin = copy.deepcopy(net)
    patch = inject(net, {nn.Linear: first, (lambda _, module: not isinstance(module, nn.Sequential)): second}, "a")
    for place in patch.attachments:
        linear = isinstance(place.target, nn.Linear) and first.selects(place.branch.parameter)
        assert place.branch.method == (first if linear else second)
    perturb(patch, 1)
    with tempfile.TemporaryDirectory() as folder:
        patch.save_pretrained(folder, format="fluxion")
        loaded = adapters.load(twin, folder)
    close(twin(x), net(x))
    assert {place.path for place in loaded.attachments} == {place.path for place in patch.attachments}
    assert Path(folder).name == loaded.name
