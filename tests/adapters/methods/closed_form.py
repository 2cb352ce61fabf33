"""What the closed forms of the methods are compared on."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor, nn

from adapters import Branch

few = settings(max_examples=40)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


@st.composite
def layers_of(draw: st.DrawFn, multiple: int = 1) -> nn.Sequential:
    """A model of linear layers and a convolution of any sizes, which are multiples of a number."""
    sizes = st.integers(1, 6).map(lambda size: size * multiple)
    shapes: list[Any] = draw(st.lists(st.tuples(sizes, sizes), min_size=1, max_size=3))
    kernel = draw(st.integers(1, 2))
    layers = [nn.Linear(*shape) for shape in shapes]
    return nn.Sequential(*layers, nn.Conv2d(draw(sizes), draw(sizes), (kernel, 2))).double()


def delta_of(branch: Branch) -> Tensor:
    """What a branch adds to the matrix of a weight: what it makes of it, less the weight."""
    weight = torch.randn(branch.matrix.shape, dtype=torch.float64)
    with torch.no_grad():
        return branch.method.change(weight, branch.values(torch.float64), 1.0) - weight
