"""Branches that are made together: what `build` makes one at a time, and nothing shared that may change."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
from adapters import LoRA, Method, TargetError
from adapters.methods.core.building import Mould, tied_to
from adapters.methods.core.method import Branch

METHODS: list[Method] = [
    LoRA(rank=2),
    LoRA(rank=2, alpha=5, dropout=0.1),
    LoRA(rank=2, bias=True),
    LoRA(rank=2, init="pissa"),
    LoRA(rank=2, init="orthogonal"),
    adapters.DoRA(rank=2),
    adapters.VeRA(rank=2),
    adapters.IA3(),
    adapters.LoKr(rank=2),
    adapters.BitFit(),
    adapters.OFT(block_size=2),
]


def model(count: int = 4) -> nn.Module:
    return nn.Sequential(*(nn.Linear(8, 6 if number % 2 else 8) for number in range(count)), nn.Conv2d(4, 4, 3))


def branches(method: Method, count: int = 4) -> list[Branch]:
    made = model(count)
    targets = [str(number) for number in range(count)]
    return [node.branches[0] for node in _nodes(made, method, targets)]


def _nodes(made: nn.Module, method: Method, targets: list[str]) -> list[Any]:
    adapters.inject(made, method, targets=targets)
    return [made[int(target)] for target in targets]  # type: ignore[index]


def tables(module: nn.Module) -> list[int]:
    """All that a module holds and may change."""
    return [id(value) for value in vars(module).values() if isinstance(value, (dict, set))]


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_each_is_what_is_built_alone(method: Method) -> None:
    together = branches(method)
    for number, branch in enumerate(together):
        alone = branches(method, number + 1)[-1]
        assert str(branch) == str(alone)
        assert branch.names == alone.names and branch.bypass == alone.bypass
        assert branch.matrix == alone.matrix and branch.parameter == alone.parameter
        assert [(name, type(module)) for name, module in branch.named_modules()] == [
            (name, type(module)) for name, module in alone.named_modules()
        ]
        assert {name: (t.shape, t.dtype, t.requires_grad) for name, t in branch.tensors().items()} == {
            name: (t.shape, t.dtype, t.requires_grad) for name, t in alone.tensors().items()
        }


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_none_shares_what_may_change(method: Method) -> None:
    together = branches(method)
    assert len({id(module) for branch in together for module in branch.modules()}) == sum(
        len(list(branch.modules())) for branch in together
    )
    seen = [number for branch in together for module in branch.modules() for number in tables(module)]
    assert len(seen) == len(set(seen))
    own = [
        parameter.data_ptr()
        for branch in together
        for name, parameter in branch.named_parameters()
        if name not in branch.common
    ]
    assert len(own) == len(set(own))


def test_starts_are_random_and_change_nothing() -> None:
    made, x = model(), torch.randn(3, 8)
    expected = made[0](x)  # type: ignore[index]
    nodes = _nodes(made, LoRA(rank=2), ["0", "2"])
    assert torch.equal(nodes[0](x), expected)
    first, second = (node.branches[0].lora_A.weight for node in nodes)
    assert not torch.equal(first, second)
    for a in (first, second):
        assert 0 < a.abs().max() <= 8**-0.5


def test_the_same_seed_gives_the_same_branches() -> None:
    def values() -> list[Tensor]:
        made = model()
        return list(adapters.inject(made, LoRA(rank=2), seed=3).state_dict().values())

    assert all(torch.equal(a, b) for a, b in zip(values(), values(), strict=True))


def test_the_order_is_that_of_the_sites() -> None:
    """Though weights of one kind are made together."""
    made = model()
    places = [
        place.path for place in adapters.inject(made, LoRA(rank=2), targets=[str(n) for n in range(4)]).attachments
    ]
    assert places == ["0", "1", "2", "3"]
    for number in range(4):
        branch = made[number].branches[0]  # type: ignore[index]
        assert branch.lora_B.weight.shape == ((6 if number % 2 else 8), 2)


def test_a_hook_on_one_is_not_on_another() -> None:
    together = branches(LoRA(rank=2, alpha=4, dropout=0.1))
    for part in ("", "Dropout", "lora_A", "Multiply", "lora_B"):
        together[1].get_submodule(part).register_forward_hook(lambda *_: None)
        for other in (together[0], *together[2:]):
            assert not other.get_submodule(part)._forward_hooks
        assert len(together[1].get_submodule(part)._forward_hooks) == 1


def test_one_in_another_mode() -> None:
    together = branches(LoRA(rank=2, dropout=0.1))
    together[1].eval()
    assert all(module.training for module in together[0].modules())
    assert not any(module.training for module in together[1].modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda branch: pickle.loads(pickle.dumps(branch))])
def test_copies(copied: Any) -> None:
    made, x = model(), torch.randn(3, 8)
    adapters.inject(made, LoRA(rank=2, alpha=3), targets=["0", "2"])
    twin = copied(made)
    assert torch.equal(twin[0](x), made[0](x))  # type: ignore[index]
    twin[0].branches[0].lora_A.register_forward_hook(lambda *_: None)
    assert not made[0].branches[0].lora_A._forward_hooks  # type: ignore[index]


def test_a_mould() -> None:
    first = branches(LoRA(rank=2, alpha=3))[0]
    mould = Mould.of(first)
    assert mould is not None
    assert list(mould.parameters) == ["lora_A.weight", "lora_B.weight"]
    values = [torch.randn(2, 8), torch.randn(8, 2)]
    cast = mould.cast(values, requires_grad=False)
    assert cast is not first and cast.method is first.method
    for parameter, value in zip(cast.parameters(), values, strict=True):
        assert type(parameter) is nn.Parameter
        assert parameter.data_ptr() == value.data_ptr()
        assert not parameter.requires_grad
    x = torch.randn(3, 8)
    torch.testing.assert_close(cast(x), x @ values[0].T @ values[1].T * 1.5)
    assert not first(x).any()
    with pytest.raises(ValueError, match="zip"):
        mould.cast(values[:1])


@pytest.mark.parametrize("method", [LoRA(rank=2, init="pissa"), adapters.VeRA(rank=2)], ids=str)
def test_no_mould_of_what_has_more_than_parameters(method: Method) -> None:
    assert Mould.of(branches(method)[0]) is None


def test_nothing_to_train() -> None:
    made = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    before = list(made)
    with pytest.raises(TargetError):
        adapters.inject(made, adapters.BitFit(), targets=["0"])
    assert list(made) == before


def test_tied_branches_share_tensors_and_nothing_else() -> None:
    branch = branches(LoRA(rank=2, alpha=3, dropout=0.1))[0]
    twin = tied_to(branch)
    assert twin.tied and not branch.tied
    assert all(a is b for a, b in zip(twin.parameters(), branch.parameters(), strict=True))
    twin.Dropout.eval()
    assert branch.Dropout.training
