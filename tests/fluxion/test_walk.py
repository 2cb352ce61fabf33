"""Finding modules in chains and in plain modules."""

import pytest
from torch import nn

import fluxion as fl


def test_walk_of_a_chain() -> None:
    inner = fl.Chain(fl.Linear(1, 1))
    total = fl.Sum(inner, fl.Linear(1, 1))
    last = fl.Chain()
    chain = fl.Chain(total, last)
    assert list(chain.walk()) == [(total, chain), (last, chain)]
    assert list(chain.walk(fl.Linear)) == [(inner.Linear, inner), (total.Linear, total)]
    assert list(chain.walk(recurse=True)) == [
        (total, chain),
        (inner, total),
        (inner.Linear, inner),
        (total.Linear, total),
        (last, chain),
    ]


def test_a_match_is_not_entered_unless_asked() -> None:
    chain = fl.Chain(fl.Chain(fl.Chain(fl.Chain())), fl.Chain(), fl.Linear(1, 1))
    assert len(list(chain.layers(fl.Chain))) == 2
    assert len(list(chain.layers(fl.Chain, recurse=True))) == 4


def test_stop_iteration_prunes() -> None:
    chain = fl.Chain(fl.Sum(fl.Chain(fl.Linear(1, 1)), fl.Linear(1, 1)), fl.Linear(1, 1))

    def outside_of_sums(module: nn.Module, parent: nn.Module) -> bool:
        if isinstance(module, fl.Sum):
            raise StopIteration
        return isinstance(module, nn.Linear)

    assert [parent for _, parent in chain.walk(outside_of_sums)] == [chain]


def test_types_and_tuples_of_types() -> None:
    chain = fl.Chain(fl.Linear(1, 1), fl.ReLU(), fl.Tanh(), nn.ReLU())
    assert [module for module, _ in chain.walk((fl.ReLU, fl.Linear))] == [chain[0], chain[1]]
    assert [module for module, _ in chain.walk(nn.Linear)] == [chain[0]]


@pytest.mark.parametrize("predicate", [list[int], 3, "Linear", (fl.Linear, 3), ()])
def test_other_predicates_raise(predicate: object) -> None:
    with pytest.raises(fl.ChainTypeError, match="cannot be used to select modules"):
        list(fl.walk(fl.Chain(fl.ReLU()), predicate))  # type: ignore[call-overload]


class Block(nn.Module):
    """A plain module with a chain, a container and an empty slot in it."""

    def __init__(self) -> None:
        super().__init__()
        self.chain = fl.Chain(nn.Linear(1, 1))
        self.many = nn.ModuleList([nn.Linear(1, 1)])
        self.nothing = None
        self.register_module("empty", None)


def test_plain_modules_are_entered() -> None:
    block = Block()
    chain = fl.Chain(nn.Sequential(nn.ReLU(), block), fl.Linear(1, 1))
    found = list(chain.walk(nn.Linear))
    assert found == [(block.chain[0], block.chain), (block.many[0], block.many), (chain.Linear, chain)]
    assert list(chain.layers(nn.Linear)) == [module for module, _ in found]
    assert chain.find(Block) is block
    assert chain.find_parent(block.many[0]) is block.many


def test_a_plain_model_is_walked_like_a_chain() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Sequential(nn.Linear(1, 1)))
    assert list(fl.walk(model, nn.Linear)) == [(model[0], model), (model[1][0], model[1])]
    layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 1, 4), 2, enable_nested_tensor=False)
    names = {name for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    assert len(list(fl.walk(layers, nn.Linear))) == len(names) == 6


def test_every_place_of_a_shared_module() -> None:
    leaf = nn.Linear(1, 1)
    block = nn.Sequential(leaf)
    chain = fl.Chain(block, fl.Chain(leaf), block)
    assert [parent for _, parent in chain.walk(nn.Linear)] == [block, chain[1], block]


def test_changes_during_the_walk() -> None:
    chain = fl.Chain(fl.Chain(fl.Linear(1, 1), fl.ReLU()), fl.Linear(1, 1))
    for layer, parent in chain.walk(fl.Linear):
        parent.replace(layer, fl.Chain(fl.Identity(), layer))
    assert repr(chain).count("Identity") == 2
    assert len(list(chain.walk(fl.Linear))) == 2


def test_deeper_than_the_stack() -> None:
    chain = fl.Chain(fl.Linear(1, 1))
    for _ in range(5000):
        chain = fl.Chain(chain)
    assert len(list(chain.walk(fl.Linear))) == 1
    assert len(list(chain.walk(recurse=True))) == 5001
    while len(chain) and isinstance(chain[0], fl.Chain):  # Freed link by link, as torch's own containers must be.
        chain = chain.pop()
