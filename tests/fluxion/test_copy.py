"""Copies of every kind: structural, deep, pickled, saved, and slices."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fluxion as fl


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: Any) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, pickled, saved]


def double(x: Tensor) -> Tensor:
    return 2 * x


class Tree(fl.Chain):
    def init_context(self) -> fl.Contexts:
        return {"skip": {"x": None}}


def tree() -> Tree:
    return Tree(
        fl.SetContext("skip", "x"),
        fl.Chain(fl.Linear(2, 2), nn.Sequential(nn.BatchNorm1d(2), nn.ReLU())),
        fl.Sum(fl.Identity(), fl.UseContext("skip", "x").compose(double)),
    )


def assert_valid(chain: fl.Chain, parent: fl.Chain | None = None) -> None:
    """Every parent link below says what is the case."""
    assert chain.parent is parent
    for child in chain:
        if isinstance(child, fl.Chain):
            assert_valid(child, chain)
        elif isinstance(child, fl.ContextModule):
            assert child.parent is chain


# Whole copies


@pytest.mark.parametrize("make", COPIES)
def test_a_whole_copy_shares_nothing_and_works(make: Callable[[Any], Any]) -> None:
    original = tree()
    x = torch.randn(3, 2)
    expected = original.eval()(x)
    clone = make(original)
    assert torch.equal(clone(x), expected)
    assert repr(clone) == repr(original)
    assert not {id(m) for m in clone.modules()} & {id(m) for m in original.modules()}
    assert_valid(clone)
    assert_valid(original)
    clone.Chain.append(fl.Multiply(0.0))
    assert torch.equal(original(x), expected)
    assert clone.provider is not original.provider
    clone.set_context("skip", {"x": x})
    assert original.use_context("skip") == {"x": None}


@pytest.mark.parametrize("make", COPIES)
def test_a_copy_of_a_subtree_is_the_subtree(make: Callable[[Any], Any]) -> None:
    big = fl.Linear(500, 500)
    root = fl.Chain(fl.Chain(fl.Linear(2, 2), fl.UseContext("a", "b")), big)
    assert len(pickle.dumps(root.Chain)) < 20_000
    clone = make(root.Chain)
    assert_valid(clone)
    assert clone.root is clone
    leaf = make(root.Chain.UseContext)
    assert leaf.parent is None
    assert leaf.key == "b"


@pytest.mark.parametrize("make", COPIES)
def test_a_leaf_used_twice_stays_one_leaf(make: Callable[[Any], Any]) -> None:
    linear, reader = fl.Linear(2, 2), fl.UseContext("a", "b")
    clone = make(fl.Chain(linear, reader, fl.Chain(linear), reader))
    assert clone[0] is clone[2][0]
    assert clone[1] is clone[3]
    assert clone[1].parent is clone


def test_a_copy_made_while_another_chain_may_hold_the_original() -> None:
    block = fl.Chain(fl.Identity())
    root = fl.Chain(block)
    with block.no_parent_refresh():
        clone = copy.deepcopy(block)
    fl.Chain(clone)
    assert clone.parent is None  # That chain is gone again.
    holder = fl.Chain()
    holder.append(clone)
    assert clone.parent is holder
    assert block.parent is root


# Structural copies


def test_inner_nodes_are_new_and_leaves_shared() -> None:
    original = tree()
    clone = original.structural_copy()
    assert type(clone) is Tree
    assert repr(clone) == repr(original)
    assert list(clone._modules) == list(original._modules)
    assert clone.Chain is not original.Chain
    assert clone.Chain.Linear is original.Chain.Linear
    assert clone.Chain.Sequential is original.Chain.Sequential
    assert clone.Sum.UseContext is not original.Sum.UseContext
    assert_valid(clone)
    assert_valid(original)
    x = torch.randn(3, 2)
    assert torch.equal(clone.eval()(x), original.eval()(x))
    clone.Chain.pop()
    assert len(original.Chain) == 2


def test_everything_a_node_has_is_kept() -> None:
    class Node(fl.Chain):
        def __init__(self) -> None:
            super().__init__(fl.Identity())
            self.public, self._private, self._shared = 3, "private", [1]
            self.weight = nn.Parameter(torch.ones(1))
            self.register_buffer("kept", torch.ones(1))
            self.register_buffer("fleeting", torch.ones(1), persistent=False)

    calls: list[str] = []
    node = Node().eval()
    node.register_forward_hook(lambda *_: calls.append("forward"))
    node.register_forward_pre_hook(lambda *_: calls.append("before"))
    clone = node.structural_copy()
    assert (clone.public, clone._private, clone._shared) == (3, "private", [1])
    assert clone.training is False
    assert clone.weight is node.weight
    assert clone.kept is node.kept
    assert list(clone.state_dict()) == list(node.state_dict()) == ["weight", "kept"]
    clone(torch.ones(1))
    assert calls == ["before", "forward"]

    # From here on they are two.
    clone.register_buffer("more", torch.ones(1), persistent=False)
    clone.register_forward_hook(lambda *_: calls.append("clone only"))
    clone.train()
    assert node.training is False
    assert not hasattr(node, "more")
    node.register_buffer("more", torch.ones(1))
    assert list(node.state_dict()) == ["weight", "kept", "more"]
    assert list(clone.state_dict()) == ["weight", "kept"]
    calls.clear()
    node(torch.ones(1))
    assert calls == ["before", "forward"]


def test_the_copy_of_a_compiled_chain_runs_itself() -> None:
    chain = fl.Chain(fl.Identity())
    chain.compile(backend="eager")
    clone = chain.structural_copy()
    clone.append(fl.Multiply(3.0))
    assert clone(torch.ones(1)) == 3.0


def test_a_copy_has_no_parent_and_no_prepared_context() -> None:
    block = fl.Chain(fl.UseContext("a", "b"))
    root = fl.Chain(block)
    block.set_context("a", {"b": 1.0})
    clone = block.structural_copy()
    assert clone.parent is None
    assert root.Chain is block
    with pytest.raises(fl.ContextError):
        clone(torch.ones(1))
    assert block(torch.ones(1)) == 1.0


def test_a_shared_leaf_with_a_parent_link_is_copied_once() -> None:
    leaf = fl.UseContext("a", "b")
    clone = fl.Chain(leaf, fl.Identity(), leaf).structural_copy()
    assert clone[0] is clone[2] is not leaf
    assert clone[0].parent is clone


def test_hooks_around_a_structural_copy() -> None:
    class Node(fl.Chain):
        told: list[object]

        def _pre_structural_copy(self) -> None:
            self.told = ["before"]

        def _post_structural_copy(self, source: fl.Chain) -> None:
            self.told = [source]

    node = Node()
    clone = fl.Chain(node).structural_copy()
    assert node.told == ["before"]
    assert clone.Node.told == [node]


def test_other_ways_to_the_same_copy() -> None:
    chain, linear = fl.Chain(fl.Linear(1, 1)), fl.Linear(1, 1)
    assert copy.copy(chain).Linear is chain.Linear
    assert fl.structural_copy(chain).Linear is chain.Linear
    assert fl.structural_copy(linear) is linear


# Slices


SLICES = [
    slice(1, 4),
    slice(None, -1),
    slice(None),
    slice(2, 2),
    slice(None, None, 2),
    slice(None, None, -1),
    slice(-2, None),
]


@pytest.mark.parametrize("where", SLICES, ids=str)
def test_a_slice_is_a_chain_of_these_children(where: slice) -> None:
    chain = fl.Chain(*[fl.Linear(1, 1) for _ in range(4)], fl.Chain(fl.Linear(1, 1)), fl.Linear(1, 1))
    part = chain[where]
    assert len(chain) == 6
    expected = list(chain)[where]
    assert [chain.key_of(layer) for layer in expected] == list(part._modules)
    assert all(new is old or new.Linear is old.Linear for new, old in zip(part, expected, strict=True))
    assert_valid(part)
    assert_valid(chain)
    x = torch.randn(3, 1)
    assert torch.equal(part(x), nn.Sequential(*expected)(x))


def test_a_slice_has_the_class_of_its_chain() -> None:
    chain = fl.Sum(fl.Multiply(1.0), fl.Multiply(2.0), fl.Multiply(4.0))
    assert isinstance(chain[1:], fl.Sum)
    assert chain[1:](torch.ones(1)) == 6.0


def test_a_slice_of_uses_of_one_leaf() -> None:
    leaf = fl.UseContext("a", "b")
    part = fl.Chain(leaf, leaf, fl.Identity(), leaf)[1:3]
    assert len(part) == 2
    assert part[0].parent is part
