"""The first tensor among the inputs or outputs of a module."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor


def first_tensor(values: Any) -> Tensor | None:
    """The first tensor of the inputs or outputs of a module: a tensor, a tuple, a list or a mapping."""
    if isinstance(values, Tensor):
        return values
    values = values.values() if isinstance(values, Mapping) else values
    return next((value for value in values if isinstance(value, Tensor)), None)


def with_first_tensor(values: Any, tensor: Tensor) -> Any:
    """Copies of the outputs of a module with another first tensor."""
    if isinstance(values, Tensor):
        return tensor
    first = first_tensor(values)
    if isinstance(values, Mapping):
        changed: Any = copy.copy(values)
        changed[next(key for key, value in values.items() if value is first)] = tensor
        return changed
    return rebuilt(values, [tensor if value is first else value for value in values])


def rebuilt(values: Any, parts: list[Any]) -> Any:
    """A tuple, a named tuple or a list of the class of another one."""
    return type(values)(*parts) if hasattr(values, "_fields") else type(values)(parts)
