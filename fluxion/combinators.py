"""Combinators: chains that call their children side by side, or combine the outputs into one."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable
from itertools import repeat
from typing import Any

import torch
from torch import Tensor, nn

from fluxion.chain import Chain
from fluxion.errors import ChainValueError


class Parallel(Chain):
    """Children called with the same inputs; returns their outputs as a tuple.

    Example:
        >>> fl.Parallel(fl.Identity(), fl.Multiply(2.0))(torch.tensor([1.0]))
        (tensor([1.]), tensor([2.]))
    """

    _tag = "PAR"
    _tag_only = True

    def forward(self, *args: Any) -> tuple[Any, ...]:
        return tuple(self._call_each(repeat(args)))


class Distribute(Chain):
    """Children called with one input each, in order; returns their outputs as a tuple.

    Raises:
        ChainValueError: The number of inputs is not the number of children.

    Example:
        >>> fl.Distribute(fl.Multiply(2.0), fl.Multiply(3.0))(torch.tensor([1.0]), torch.tensor([1.0]))
        (tensor([2.]), tensor([3.]))
    """

    _tag = "DISTR"
    _tag_only = True

    def forward(self, *args: Any) -> tuple[Any, ...]:
        if len(args) != len(self):
            raise ChainValueError(f"{self.get_path()} has {len(self)} children but was given {len(args)} inputs.")
        return tuple(self._call_each((arg,) for arg in args))


class Passthrough(Chain):
    """Children called in order for their side effects; returns the inputs unchanged.

    Example:
        >>> seen = []
        >>> fl.Passthrough(fl.Multiply(2.0), fl.Lambda(seen.append))(torch.tensor([1.0])), seen
        (tensor([1.]), [tensor([2.])])
    """

    _tag = "PASS"
    _tag_only = True

    def forward(self, *args: Any) -> Any:
        super().forward(*args)
        return args[0] if len(args) == 1 else args


class Sum(Chain):
    """Children called with the same inputs; returns the sum of their outputs. A tuple is summed itself first.

    Raises:
        ChainValueError: There are no children.

    Example:
        >>> fl.Sum(fl.Identity(), fl.Multiply(2.0))(torch.tensor([1.0]))
        tensor([3.])
    """

    _tag = "SUM"
    _tag_only = True

    def forward(self, *args: Any) -> Any:
        if not self._modules:
            raise ChainValueError(f"{self.get_path()} has nothing to add: give it a child.")
        outputs = self._call_each(repeat(args))
        return _add(_add(output) if isinstance(output, tuple) else output for output in outputs)


class Residual(Chain):
    """Children called in order; returns their output plus the input, of the same shape.

    Raises:
        ChainValueError: There is not exactly one input.

    Example:
        >>> fl.Residual(fl.Multiply(2.0), fl.Multiply(2.0))(torch.tensor([1.0]))
        tensor([5.])
    """

    _tag = "RES"

    def forward(self, *args: Any) -> Any:
        if len(args) != 1:
            raise ChainValueError(f"{self.get_path()} adds its one input to its output, but was given {len(args)}.")
        return super().forward(*args) + args[0]


class Concatenate(Chain):
    """Children called with the same inputs; returns their outputs, without those that are None, concatenated.

    Example:
        >>> fl.Concatenate(fl.Identity(), fl.Multiply(2.0), dim=-1)(torch.ones(1, 2))
        tensor([[1., 1., 2., 2.]])
    """

    _tag = "CAT"
    _tag_only = True

    def __init__(self, *modules: nn.Module | Iterable[nn.Module], dim: int = 0) -> None:
        """
        Args:
            modules: The children, or one iterable of them.
            dim: Dimension to concatenate along.
        """
        super().__init__(*modules)
        self.dim = dim

    def forward(self, *args: Any) -> Tensor:
        return torch.cat([output for output in self._call_each(repeat(args)) if output is not None], dim=self.dim)


class Matmul(Chain):
    """Two children called with the same inputs; returns the matrix product of their outputs.

    Shapes: outputs `(..., n, k)` and `(..., k, m)` to `(..., n, m)`.

    Example:
        >>> fl.Matmul(fl.Identity(), fl.Transpose(0, 1))(torch.tensor([[1.0, 2.0]]))
        tensor([[5.]])
    """

    _tag = "MATMUL"

    def __init__(self, input: nn.Module, other: nn.Module) -> None:
        super().__init__(input, other)

    def forward(self, *args: Any) -> Tensor:
        left, right = self._call_each(repeat(args))
        return torch.matmul(left, right)


def _add(terms: Iterable[Any]) -> Any:
    """Sum of some terms, without the zero that `sum` starts from."""
    return functools.reduce(operator.add, terms)
