"""Keys: where they come from, and that they stay."""

import pytest
import torch
from torch import nn

import fluxion as fl


class Linear_1(fl.Linear):
    """A class whose name is what a second Linear would be called."""


def keys(chain: fl.Chain) -> list[str]:
    return list(chain._modules)


def test_suffix_only_when_repeated() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.ReLU(), fl.Linear(1, 1))
    assert keys(chain) == ["Linear_1", "ReLU", "Linear_2"]


def test_names_never_drop_a_module() -> None:
    layers = [fl.Linear(1, 1), Linear_1(1, 1), fl.Linear(1, 1)]
    chain = fl.Chain(*layers)
    assert len(chain) == 3
    assert list(chain) == layers
    assert len(set(keys(chain))) == 3

    grown = fl.Chain()
    for layer in [Linear_1(1, 1), fl.Linear(1, 1), fl.Linear(1, 1), Linear_1(1, 1)]:
        grown.append(layer)
    assert len(grown) == len(set(keys(grown))) == 4


def test_appending_renames_no_sibling() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.ReLU())
    saved = {name: tensor.clone() for name, tensor in chain.state_dict().items()}
    first = chain.Linear

    chain.append(fl.Linear(1, 1))

    assert keys(chain) == ["Linear", "ReLU", "Linear_2"]
    found = chain.load_state_dict(saved, strict=False)
    assert found.unexpected_keys == []
    assert found.missing_keys == ["Linear_2.weight", "Linear_2.bias"]
    assert torch.equal(first.weight, saved["Linear.weight"])


def test_keys_of_siblings_survive_every_change() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1), fl.Linear(1, 1))
    first, second, third = chain
    chain.insert(0, fl.Linear(1, 1))
    assert [chain.key_of(layer) for layer in (first, second, third)] == ["Linear_1", "Linear_2", "Linear_3"]
    chain.remove(second)
    chain.replace(first, fl.ReLU())
    assert keys(chain) == ["Linear_4", "Linear_1", "Linear_3"]
    assert chain["Linear_3"] is third


def test_replacing_keeps_the_key() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.ReLU())
    new = fl.Chain(fl.Linear(1, 1))
    chain.replace(chain.ReLU, new)
    assert keys(chain) == ["Linear", "ReLU"]
    assert chain[1] is new
    chain[0] = nn.Identity()
    assert keys(chain) == ["Linear", "ReLU"]
    chain["ReLU"] = fl.Tanh()
    chain.ReLU = fl.Sigmoid()
    assert isinstance(chain[1], fl.Sigmoid)
    assert new.parent is None


def test_names_are_read_as_positions_where_no_key_has_them() -> None:
    chain = fl.Chain(fl.Linear(1, 1))
    chain.append(fl.Linear(1, 1))
    assert keys(chain) == ["Linear", "Linear_2"]
    assert chain.Linear_1 is chain["Linear_1"] is chain[0]
    chain.pop(0)
    assert chain.Linear is chain.Linear_2 is chain[0]
    with pytest.raises(AttributeError, match="Linear_3"):
        _ = chain.Linear_3
    with pytest.raises(KeyError, match="its children are Linear_2"):
        chain["Linear_3"]


def test_a_free_key_is_used_again() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1))
    chain.append(chain.pop())
    assert keys(chain) == ["Linear_1", "Linear_2"]


def test_next_key_after_a_slice_is_always_the_same() -> None:
    part = fl.Chain(fl.Identity() for _ in range(6))[:2]
    part.append(fl.Identity())
    assert keys(part) == ["Identity_1", "Identity_2", "Identity_3"]


def test_a_key_of_your_own() -> None:
    chain = fl.Chain(fl.Linear(1, 1))
    block = fl.Chain(fl.ReLU())
    chain.add_module("block", block)
    assert chain.block is chain[1] is block
    assert block.parent is chain
    assert block.ReLU.get_path(block) == "Chain.block.ReLU"
    with pytest.raises(fl.ChainTypeError):
        chain.add_module("nothing", None)
    assert keys(chain) == ["Linear", "block"]


def test_dir_and_hasattr_see_children() -> None:
    chain = fl.Chain(fl.Linear(1, 1))
    assert hasattr(chain, "Linear")
    assert not hasattr(chain, "Conv2d")
    assert "Linear" in dir(chain)


def test_get_path() -> None:
    inner = fl.Chain(fl.Linear(1, 1), fl.UseContext("a", "b"))
    root = fl.Chain(fl.Sum(fl.Identity(), inner), fl.Linear(1, 1))
    assert root.get_path() == "Chain"
    assert inner.get_path() == "Chain.Sum.Chain"
    assert inner.UseContext.get_path() == "Chain.Sum.Chain.UseContext"
    assert inner.Linear.get_path(inner) == "Chain.Sum.Chain.Linear"
    assert inner.get_path(top=root.Sum) == "Sum.Chain"
    with pytest.raises(fl.ChainValueError, match="not a child"):
        inner.Linear.get_path(root)
