"""Output shapes of every node of a tree, recorded in one call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def note_of_call(root: nn.Module, *inputs: Any) -> Callable[[nn.Module], str]:
    """Call a module in eval mode without gradients, and return a function from a node to the text of its output shapes.

    A node that returns several shapes in turn shows each of them once; a node that is not called shows none. Training
    flags and hooks are left as they were.
    """
    seen: dict[nn.Module, dict[str, None]] = {}

    def record(module: nn.Module, args: Any, output: Any) -> None:
        seen.setdefault(module, {})[_shape(output)] = None

    modes = {module: module.training for module in root.modules()}
    hooks = [module.register_forward_hook(record) for module in modes]
    try:
        for module in modes:
            module.training = False  # Bypasses `train` methods, which may do more.
        with torch.no_grad():
            root(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    return lambda module: f" → {' | '.join(seen[module])}" if module in seen else ""


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_shape, value))}]"
    return type(value).__name__
