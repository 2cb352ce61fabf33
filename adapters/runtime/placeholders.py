"""Placeholders for weights that no single tensor can stand for."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adapters.errors import AdapterError, RowsError, TargetError


class NoWeight(Tensor):
    """The weight of a layer whose adapters are no change of weights: it has a shape and a dtype, but no values.

    Torch's fused kernels step aside for tensors of a class of its own, and call the layer instead.
    """

    @classmethod
    def error(cls) -> AdapterError:
        """What to raise when the values are asked for."""
        return TargetError("A layer that is read by its weight cannot have an adapter that is no change of weights.")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise cls.error()


class RowWeight(NoWeight):
    """The weight of a layer while rows have weights of their own."""

    @classmethod
    def error(cls) -> AdapterError:
        return RowsError("A layer that is read by its weight cannot have different adapters for each row.")
