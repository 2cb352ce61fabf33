"""The picture of a tree as text."""

import functools
import textwrap

import torch
from torch import nn

import fluxion as fl


def test_tags_numbers_and_counts() -> None:
    chain = fl.Chain(
        fl.Chain(fl.Linear(1, 1), fl.Linear(1, 1), fl.Linear(1, 2)),
        fl.Residual(fl.ReLU(), fl.ReLU()),
        fl.Chain(fl.Linear(1, 1)),
        fl.Chain(fl.Linear(1, 1)),
        fl.Parallel(fl.Identity(), fl.GetArg(1)),
        fl.Distribute(),
        fl.Passthrough(),
        fl.Sum(),
        fl.Concatenate(dim=1),
        fl.Matmul(fl.Identity(), fl.Identity()),
    )
    assert repr(chain) == textwrap.dedent("""\
        (CHAIN)
            ├── (CHAIN) #1
            │   ├── Linear(in_features=1, out_features=1, device=cpu, dtype=float32) (x2) #1
            │   └── Linear(in_features=1, out_features=2, device=cpu, dtype=float32) #2
            ├── (RES) Residual()
            │   └── ReLU() (x2)
            ├── (CHAIN) (x2) #2
            │   └── Linear(in_features=1, out_features=1, device=cpu, dtype=float32)
            ├── (PAR)
            │   ├── Identity()
            │   └── GetArg(index=1)
            ├── (DISTR)
            ├── (PASS)
            ├── (SUM)
            ├── (CAT)
            └── (MATMUL) Matmul()
                └── Identity() (x2)""")


def test_plain_modules_are_nodes_too() -> None:
    chain = fl.Chain(nn.Sequential(nn.Linear(1, 2), nn.Sequential(nn.ReLU())), nn.Dropout(0.1))
    assert repr(chain) == textwrap.dedent("""\
        (CHAIN)
            ├── Sequential()
            │   ├── Linear(in_features=1, out_features=2, bias=True)
            │   └── Sequential()
            │       └── ReLU()
            └── Dropout(p=0.1, inplace=False)""")


def test_seven_levels() -> None:
    chain = functools.reduce(lambda inner, _: fl.Chain(inner), range(9), fl.Chain(fl.Identity()))
    lines = repr(chain).splitlines()
    assert len(lines) == 8
    assert lines[-1].strip() == "└── (CHAIN) ..."


def test_attributes_that_differ_from_the_default() -> None:
    class Layer(fl.Module):
        def __init__(self, size: int, name: str = "a", flag: bool = False, other: object = None) -> None:
            super().__init__()
            self.size, self.name, self.flag, self.other = size, name, flag, other
            self._hidden, self.not_an_argument = 1, 2

    assert repr(Layer(3)) == "Layer(size=3)"
    assert repr(Layer(3, "b", True, other=object())) == "Layer(size=3, name=b, flag=True)"
    assert Layer(3).basic_attributes() == {
        "training": True,
        "size": 3,
        "name": "a",
        "flag": False,
        "not_an_argument": 2,
    }
    assert Layer(3).basic_attributes(init_attrs_only=True) == {"size": 3}


def test_a_user_may_word_the_line_of_a_node() -> None:
    class Named(fl.Chain):
        def __str__(self) -> str:
            return "the encoder"

    class Tagged(fl.Residual):
        _tag = "MINE"

    assert repr(fl.Chain(Named(fl.ReLU()), Tagged())) == textwrap.dedent("""\
        (CHAIN)
            ├── (CHAIN) the encoder
            │   └── ReLU()
            └── (MINE) Tagged()""")


def test_weighted_modules_say_where_and_what_they_are() -> None:
    layer = fl.Linear(1, 1, device="meta", dtype=torch.float16)
    assert str(layer) == repr(layer) == "Linear(in_features=1, out_features=1, device=meta, dtype=float16)"
    assert str(fl.LayerNorm2d(4).to(torch.float64)) == "LayerNorm2d(channels=4, device=cpu, dtype=float64)"


def test_lambdas() -> None:
    def scale(x: torch.Tensor, by: float = 2.0) -> torch.Tensor:
        return by * x

    assert str(fl.Lambda(scale)).startswith("Lambda(scale(x:")
    assert str(fl.Lambda(functools.partial(scale, by=3.0))).startswith("Lambda(partial(x:")
    assert str(fl.Lambda(torch.relu)) == "Lambda(relu)"


def test_printing_a_chain_shows_the_tree() -> None:
    chain = fl.Chain(fl.Identity())
    assert str(chain) == repr(chain) == "(CHAIN)\n    └── Identity()"


def test_a_wide_tree_is_rendered_in_linear_time() -> None:
    chain = fl.Chain(fl.Chain(fl.Multiply(float(i)), fl.ReLU()) for i in range(3000))
    assert len(repr(chain).splitlines()) == 9001
