"""Placeholders for the weight of a layer where no tensor has the values that it computes with."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from adapters.errors import AdapterError, RowsError, TargetError


class NoWeight(Tensor):
    """The weight of a layer with adapters that cannot be merged: it has a shape and a dtype, but no values.

    Torch's fused kernels are skipped for subclasses of Tensor, and the layer is called instead.
    """

    @classmethod
    def error(cls) -> AdapterError:
        """The error for an access to the values."""
        return TargetError("A layer that is read by its weight cannot have an adapter that cannot be merged.")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "__get__":
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise cls.error()


class RowWeight(NoWeight):
    """The weight of a layer during a mixed batch."""

    @classmethod
    def error(cls) -> AdapterError:
        return RowsError("A layer that is read by its weight cannot have different adapters for each row.")
