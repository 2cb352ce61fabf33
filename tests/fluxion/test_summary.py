"""The tree with the shapes of what passes through it."""

import textwrap

import pytest
import torch
from torch import Tensor, nn

import fluxion as fl


def test_shapes_of_every_node() -> None:
    model = fl.Chain(
        fl.Linear(3, 4),
        fl.Parallel(fl.Identity(), fl.Chain(nn.Sequential(nn.Linear(4, 2)), nn.ReLU())),
        fl.Lambda(lambda x, y: [y, "text"]),
    )
    assert model.summary(torch.ones(5, 3)) == textwrap.dedent("""\
        (CHAIN) → [(5, 2), str]
            ├── Linear(in_features=3, out_features=4, device=cpu, dtype=float32) → (5, 4)
            ├── (PAR) → [(5, 4), (5, 2)]
            │   ├── Identity() → (5, 4)
            │   └── (CHAIN) → (5, 2)
            │       ├── Sequential() → (5, 2)
            │       │   └── Linear(in_features=4, out_features=2, bias=True) → (5, 2)
            │       └── ReLU() → (5, 2)
            └── Lambda(<lambda>(x, y)) → [(5, 2), str]""")
    assert model.summary(torch.ones(5, 3), depth=0) == "(CHAIN) → [(5, 2), str] ..."


def test_only_siblings_with_the_same_shapes_are_folded() -> None:
    model = fl.Chain(fl.Unsqueeze(0), fl.Unsqueeze(0), fl.ReLU(), fl.ReLU())
    assert model.summary(torch.ones(2)) == textwrap.dedent("""\
        (CHAIN) → (1, 1, 2)
            ├── Unsqueeze(dim=0) → (1, 2) #1
            ├── Unsqueeze(dim=0) → (1, 1, 2) #2
            └── ReLU() → (1, 1, 2) (x2)""")


def test_a_leaf_used_for_different_shapes_and_one_never_called() -> None:
    class First(fl.Chain):
        def forward(self, x: Tensor) -> Tensor:
            return self[0](x)

    leaf = fl.Unsqueeze(0)
    lines = fl.Chain(leaf, fl.Identity(), leaf, First(fl.ReLU(), fl.Tanh())).summary(torch.ones(2)).splitlines()
    assert lines[1].endswith("Unsqueeze(dim=0) → (1, 2) | (1, 1, 2) #1")
    assert lines[-1].endswith("Tanh()")


def test_the_model_is_left_as_it_was() -> None:
    model = fl.Chain(nn.BatchNorm1d(3), fl.Dropout(), fl.Chain(fl.Linear(3, 3)).eval())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    model.summary(torch.randn(4, 3))
    with pytest.raises(RuntimeError, match="running_mean"):
        model.summary(torch.randn(4, 5))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
