"""A small classifier of digits, from its declaration to its regrouping, with every picture of it to the character."""

import textwrap

import torch

import fluxion as fl

img_res = 28
channels = 128
kernel_size = 3
hidden_layer_in = (((img_res - kernel_size + 1) // 2) ** 2) * channels
hidden_layer_out = 200
output_size = 10


class Softmax(fl.Module):
    """A leaf written by a user, which has the name of one in the library."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.softmax(x, dim=0)


class BasicModel(fl.Chain):
    def __init__(self) -> None:
        super().__init__(
            fl.Conv2d(1, channels, kernel_size),
            fl.ReLU(),
            fl.MaxPool2d(2),
            fl.Flatten(start_dim=1),
            fl.Linear(hidden_layer_in, hidden_layer_out),
            fl.ReLU(),
            fl.Linear(hidden_layer_out, output_size),
            Softmax(),
        )


class ConvLayer(fl.Chain):
    pass


class HiddenLayer(fl.Chain):
    pass


class OutputLayer(fl.Chain):
    pass


CONV = "Conv2d(in_channels=1, out_channels=128, kernel_size=(3, 3), device=cpu, dtype=float32)"
FIRST = "Linear(in_features=21632, out_features=200, device=cpu, dtype=float32)"
SECOND = "Linear(in_features=200, out_features=10, device=cpu, dtype=float32)"

FLAT = f"""\
(CHAIN) BasicModel()
    ├── {CONV}
    ├── ReLU() #1
    ├── MaxPool2d(kernel_size=2, stride=2)
    ├── Flatten(start_dim=1)
    ├── {FIRST} #1
    ├── ReLU() #2
    ├── {SECOND} #2
    └── Softmax()"""

GROUPED = f"""\
(CHAIN) BasicModel()
    ├── (CHAIN) ConvLayer()
    │   ├── {CONV}
    │   ├── ReLU()
    │   └── MaxPool2d(kernel_size=2, stride=2)
    ├── (CHAIN) HiddenLayer()
    │   ├── Flatten(start_dim=1)
    │   ├── {FIRST}
    │   └── ReLU()
    └── (CHAIN) OutputLayer()
        ├── {SECOND}
        └── Softmax()"""


def test_declared_printed_regrouped_and_iterated() -> None:
    m = BasicModel()
    x = torch.randn(2, 1, img_res, img_res)
    before = m(x)

    assert repr(m) == FLAT
    assert repr(m[0]) == CONV
    assert repr(m.Conv2d) == CONV
    assert repr(m[6]) == SECOND
    assert repr(m.Linear_2) == SECOND
    assert m[0] is m.Conv2d
    assert m[6] is m.Linear_2 is m["Linear_2"]

    # Each wrapper is built from the children it takes out, in the same expression that puts it in their place.
    m.insert(0, ConvLayer(m.pop(0), m.pop(0), m.pop(0)))
    m.insert_after_type(ConvLayer, HiddenLayer(m.pop(1), m.pop(1), m.pop(1)))
    m.append(OutputLayer(m.pop(2), m.pop(2)))

    assert repr(m) == GROUPED
    assert [str(layer) for layer in m.layers(fl.WeightedModule)] == [CONV, FIRST, SECOND]
    assert torch.equal(m(x), before)


def test_function_in_place_of_the_leaf() -> None:
    m = BasicModel()
    x = torch.randn(2, 1, img_res, img_res)
    before = m(x)

    m.replace(m.Softmax, fl.Lambda(lambda x: torch.nn.functional.softmax(x, dim=0)))

    assert torch.equal(m(x), before)
    assert repr(m).endswith("└── Lambda(<lambda>(x))")


def test_pretty_print_shows_as_many_levels_as_asked(capsys: object) -> None:
    m = fl.Chain(fl.Chain(fl.Chain(fl.Identity())), fl.Sum(fl.Identity(), fl.Identity()))
    m.pretty_print(depth=1)
    out = capsys.readouterr().out  # type: ignore[attr-defined]
    assert out == textwrap.dedent("""\
        (CHAIN)
            ├── (CHAIN) ...
            └── (SUM) ...
        """)
