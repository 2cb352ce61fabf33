"""Changing the tree: what is allowed, what raises, and that parent links always tell the truth."""

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn

import fluxion as fl


def shape(chain: fl.Chain) -> list[object]:
    """Everything a failed call could have changed."""
    return [(key, id(child), id(getattr(child, "parent", None))) for key, child in chain._modules.items()]


# Access


def test_reading_by_index_key_path_and_membership() -> None:
    block = fl.Chain(fl.Linear(1, 2), fl.Linear(2, 3))
    chain = fl.Chain(fl.ReLU(), block)
    assert len(chain) == 2
    assert list(chain) == [chain[0], chain[-1]]
    assert block in chain
    assert block.Linear_1 not in chain
    assert chain.layer("Chain", fl.Chain) is block
    assert chain.layer(("Chain", 1), fl.Linear) is block[1]
    assert chain.layer((), fl.Chain) is chain
    with pytest.raises(fl.ChainTypeError, match="not a Conv2d"):
        chain.layer(("Chain", "Linear_2"), fl.Conv2d)
    for missing in (2, -3, "Conv2d", ("Chain", 7)):
        with pytest.raises(fl.ChildNotFoundError):
            chain.layer(missing)


def test_a_path_goes_through_plain_modules() -> None:
    linear = nn.Linear(1, 1)
    chain = fl.Chain(nn.Sequential(nn.ReLU(), linear))
    assert chain.layer(("Sequential", 1)) is linear
    with pytest.raises(fl.ChildNotFoundError, match="no child 5"):
        chain.layer(("Sequential", 5))


def test_finding() -> None:
    inner = fl.Chain(fl.Linear(1, 1))
    chain = fl.Chain(fl.Sum(inner), fl.Linear(1, 1))
    assert chain.find(fl.Linear) is chain.ensure_find(fl.Linear) is inner.Linear
    assert chain.find(fl.Conv2d) is None
    assert chain.find_parent(inner.Linear) is chain.ensure_find_parent(inner.Linear) is inner
    assert chain.find_parent(chain.Sum) is chain
    assert chain.find_parent(fl.Linear(1, 1)) is None
    with pytest.raises(fl.ChildNotFoundError, match="no Conv2d"):
        chain.ensure_find(fl.Conv2d)
    with pytest.raises(fl.ChildNotFoundError, match="is not in Chain"):
        chain.ensure_find_parent(fl.ReLU())


def test_children_are_given_one_by_one_or_as_one_iterable() -> None:
    a, b = fl.Identity(), fl.ReLU()
    assert list(fl.Chain(a, b)) == list(fl.Chain([a, b])) == list(fl.Chain(x for x in (a, b))) == [a, b]
    assert list(fl.Chain(nn.ModuleList([a, b]))) == [a, b]
    assert len(fl.Chain(nn.Sequential(a, b))) == 1
    assert len(fl.Chain(fl.Chain(a, b))) == 1


# Changing


@pytest.mark.parametrize("index", [-9, -2, -1, 0, 1, 2, 3, 9])
def test_insert_counts_as_a_list_does(index: int) -> None:
    layers: list[nn.Module] = [fl.Identity(), fl.Identity(), fl.Identity()]
    chain, new = fl.Chain(layers), fl.ReLU()
    chain.insert(index, new)
    layers.insert(index, new)
    assert list(chain) == layers


@pytest.mark.parametrize("index", [-3, -1, 0, 2])
def test_pop_counts_as_a_list_does(index: int) -> None:
    layers: list[nn.Module] = [fl.Identity(), fl.ReLU(), fl.Chain()]
    chain = fl.Chain(layers)
    assert chain.pop(index) is layers.pop(index)
    assert list(chain) == layers


def test_insert_by_type() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.ReLU(), fl.Linear(1, 1))
    before, after = fl.Identity(), fl.Tanh()
    chain.insert_before_type(fl.Linear, before)
    chain.insert_after_type(fl.Linear, after)
    assert list(chain) == [before, chain[1], after, chain.ReLU, chain[-1]]
    for insert in (chain.insert_before_type, chain.insert_after_type):
        with pytest.raises(ValueError, match="no Conv2d among the children of Chain"):
            insert(fl.Conv2d, fl.Identity())


def test_extend_is_all_or_nothing() -> None:
    chain = fl.Chain(fl.Identity())
    chain.extend([fl.ReLU(), fl.Chain()])
    assert len(chain) == 3
    before = shape(chain)
    bad = fl.Chain()
    with pytest.raises(fl.ChainValueError):
        chain.extend([fl.ReLU(), bad, bad])
    with pytest.raises(fl.ChainTypeError):
        chain.extend([fl.Chain(), "x"])  # type: ignore[list-item]
    assert shape(chain) == before
    assert bad.parent is None


CHANGES: dict[str, Callable[[fl.Chain, nn.Module], object]] = {
    "append": lambda chain, new: chain.append(new),
    "insert": lambda chain, new: chain.insert(0, new),
    "extend": lambda chain, new: chain.extend([fl.ReLU(), new]),
    "insert_before_type": lambda chain, new: chain.insert_before_type(fl.Linear, new),
    "insert_after_type": lambda chain, new: chain.insert_after_type(fl.Linear, new),
    "replace": lambda chain, new: chain.replace(chain[0], new),
    "setitem": lambda chain, new: chain.__setitem__(0, new),
    "add_module": lambda chain, new: chain.add_module("new", new),
    "register_module": lambda chain, new: chain.register_module("new", new),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("wrong", [None, "x", 3, nn.Linear, torch.zeros(1)], ids=repr)
def test_only_modules_go_in(change: Callable[[fl.Chain, object], object], wrong: object) -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.Chain())
    before = shape(chain)
    with pytest.raises(TypeError):
        change(chain, wrong)
    assert shape(chain) == before
    with pytest.raises(fl.ChainTypeError):
        fl.Chain(fl.ReLU(), wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_chain_has_one_parent(change: Callable[[fl.Chain, nn.Module], object]) -> None:
    child = fl.Chain(fl.Identity())
    home, other = fl.Chain(child), fl.Chain(fl.Linear(1, 1))
    before = shape(home), shape(other)
    with pytest.raises(ValueError, match=r"already in Chain: remove it from there, or use structural_copy\(\)"):
        change(other, child)
    assert (shape(home), shape(other)) == before
    assert child.parent is home
    # The remedies of the message work.
    change(other, child.structural_copy())
    home.remove(child)
    other.append(child)
    assert child.parent is other


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_nothing_goes_inside_itself(change: Callable[[fl.Chain, nn.Module], object]) -> None:
    inner = fl.Chain(fl.Linear(1, 1))
    root = fl.Chain(fl.Sum(inner), fl.ReLU())
    before = shape(root), shape(inner)
    for ancestor in (inner, root):
        with pytest.raises(ValueError, match="cannot be put inside itself"):
            change(inner, ancestor)
    assert (shape(root), shape(inner)) == before


def test_nothing_goes_inside_itself_by_way_of_plain_modules() -> None:
    inner = fl.Chain()
    for holder in (nn.Sequential(inner), fl.Chain(nn.Sequential(fl.ReLU(), nn.Sequential(inner)))):
        with pytest.raises(fl.ChainValueError, match="holds this chain"):
            inner.append(holder)
        assert len(inner) == 0


def test_a_chain_is_used_once() -> None:
    child = fl.Chain()
    with pytest.raises(fl.ChainValueError, match="given twice"):
        fl.Chain(child, child)
    assert child.parent is None
    parent = fl.Chain(child)
    with pytest.raises(fl.ChainValueError, match="already in"):
        parent.append(child)
    assert len(parent) == 1


def test_a_leaf_may_be_used_twice() -> None:
    for leaf in (fl.Linear(2, 2), fl.UseContext("a", "b"), nn.ReLU()):
        chain = fl.Chain(leaf, fl.Identity(), leaf)
        assert len(chain) == 3
        assert repr(chain).count(type(leaf).__name__) == 2
        assert chain.key_of(leaf) == f"{type(leaf).__name__}_1"
        assert len(list(chain.walk(type(leaf)))) == 2

        chain[2] = fl.Tanh()
        assert chain[0] is leaf
        assert isinstance(chain[2], fl.Tanh)
        chain.append(leaf)
        assert chain.pop(0) is leaf
        assert list(chain)[-1] is leaf
        assert getattr(leaf, "parent", chain) is chain
        chain.remove(leaf)
        assert leaf not in chain
        assert getattr(leaf, "parent", None) is None


def test_first_use_is_meant_where_none_is_named() -> None:
    leaf = fl.Identity()
    chain = fl.Chain(fl.ReLU(), leaf, leaf)
    chain.insert(0, leaf)
    assert chain.key_of(leaf) == next(iter(chain._modules))
    chain.replace(leaf, fl.Tanh())
    assert [type(child) for child in chain] == [fl.Tanh, fl.ReLU, fl.Identity, fl.Identity]
    chain.remove(leaf)
    assert [type(child) for child in chain] == [fl.Tanh, fl.ReLU, fl.Identity]


def test_what_leaves_has_no_parent() -> None:
    first, second, third = fl.Chain(), fl.Chain(), fl.Chain()
    chain = fl.Chain(first, second, third)
    chain.pop(0)
    chain.remove(second)
    new = fl.Chain()
    chain.replace(third, new)
    assert [child.parent for child in (first, second, third)] == [None, None, None]
    assert new.parent is chain
    del chain[0]
    assert new.parent is None
    assert len(chain) == 0
    with pytest.raises(IndexError):
        chain.pop()
    with pytest.raises(ValueError, match="not a child"):
        chain.remove(new)


def test_replaced_module_may_move_into_its_successor() -> None:
    target = fl.Chain(fl.Linear(1, 1))
    model = fl.Chain(target, fl.ReLU())
    with target.no_parent_refresh():
        wrapper = fl.Residual(target)
    assert target.parent is model
    model.replace(target, wrapper, old_module_parent=wrapper)
    assert target.parent is wrapper
    assert wrapper.parent is model

    stranger, other = fl.Chain(), fl.Chain()
    with pytest.raises(ValueError, match="not a child"):
        model.replace(wrapper, other, old_module_parent=stranger)
    assert wrapper.parent is model
    assert wrapper in model


def test_popped_subtree_runs_alone() -> None:
    class Provides(fl.Chain):
        def init_context(self) -> fl.Contexts:
            return {"own": {"value": torch.ones(1)}}

    block = Provides(fl.UseContext("own", "value"), fl.Multiply(3.0))
    model = fl.Chain(fl.Identity(), block)
    x = torch.zeros(1)
    expected = model(x)
    assert torch.equal(model.pop()(x), expected)
    assert block.root is block


def test_modules_are_set_only_where_there_is_a_child() -> None:
    class Wrong(fl.Chain):
        def __init__(self) -> None:
            self.layer_of_mine = fl.Linear(1, 1)
            super().__init__()

    with pytest.raises(ValueError, match="'layer_of_mine' is not a child"):
        Wrong()
    chain = fl.Chain(fl.Linear(1, 1))
    with pytest.raises(ValueError, match=r"add modules with append\(\)"):
        chain.extra = fl.ReLU()
    chain.kept_aside = [fl.ReLU()]
    assert len(chain) == 1
    del chain.Linear
    assert len(chain) == 0


# Torch's own ways of reading a module


def test_named_parameters_takes_torch_arguments() -> None:
    leaf = fl.Linear(1, 1, bias=False)
    chain = fl.Chain(leaf, fl.Chain(leaf))
    assert [name for name, _ in chain.named_parameters()] == ["Linear.weight"]
    names = [name for name, _ in chain.named_parameters(prefix="model", remove_duplicate=False)]
    assert names == ["model.Linear.weight", "model.Chain.Linear.weight"]
    assert [name for name, _ in chain.named_modules(prefix="m")] == ["m", "m.Linear", "m.Chain"]
    assert chain.get_submodule("Chain.Linear") is leaf


# Memory


def test_a_child_does_not_keep_its_root_alive() -> None:
    gc.disable()
    try:
        child = fl.Chain(fl.Linear(1, 1))
        leaf = fl.UseContext("a", "b")
        root = fl.Chain(fl.Sum(child), fl.Linear(4, 4), leaf)
        gone = [weakref.ref(root), weakref.ref(root.Linear), weakref.ref(root.Linear.weight)]
        del root
        assert [ref() for ref in gone] == [None, None, None]
        assert leaf.parent is None
        assert child.get_parents() == []
    finally:
        gc.enable()


def test_a_tree_is_freed_without_the_collector_after_a_call() -> None:
    gc.disable()
    try:
        root = fl.Chain(fl.Linear(1, 1), fl.Residual(fl.Linear(1, 1)))
        root.set_context("a", {"b": torch.ones(1)})
        root(torch.zeros(1, 1))
        root.key_of(root.Residual)
        gone = weakref.ref(root)
        del root
        assert gone() is None
    finally:
        gc.enable()
