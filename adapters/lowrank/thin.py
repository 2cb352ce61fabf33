"""The layers of a low-rank branch."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

import fluxion as fl


class Thin(NamedTuple):
    """The layers of a branch that adds the product of two thin matrices to the weight of a linear layer.

    Attributes:
        down: A.
        up: B.
        multiply: What scales, between them.
        dropout: What drops inputs, in front of them.
    """

    down: nn.Linear
    up: nn.Linear
    multiply: fl.Multiply | None
    dropout: nn.Dropout | None
