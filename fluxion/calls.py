"""Calls of a chain: its children run in order, and an error gets its path in the tree.

Each call of a root has its own contexts; a chain that is called within a call of its root takes part in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fluxion.context import running, start_call
from fluxion.links import Container
from fluxion.printing.location import locate

GLOBAL_HOOKS = (
    nn.modules.module._global_forward_pre_hooks,
    nn.modules.module._global_forward_hooks,
    nn.modules.module._global_backward_pre_hooks,
    nn.modules.module._global_backward_hooks,
)


class Caller(Container):
    """The part of a `Chain` that runs."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        root, outer = self.root, running.call
        if self is not root and outer is not None and outer.root is root:
            return super().__call__(*args, **kwargs)
        running.call = start_call(root)
        try:
            return super().__call__(*args, **kwargs)
        finally:
            running.call = outer

    def forward(self, *args: Any) -> Any:
        key, output = "", args[0] if len(args) == 1 else args
        try:
            for key, layer in self._modules.items():  # noqa: B007
                output = entry(layer)(*args)
                args = output if isinstance(output, tuple) else (output,)
        except Exception as error:
            if not torch.compiler.is_compiling():  # Dynamo cannot trace it; a call that raises runs again uncompiled.
                locate(error, self, key, args)
            raise
        return output

    def _call_each(self, inputs: Iterable[tuple[Any, ...]]) -> list[Any]:
        """Outputs of the children, each called with its own inputs."""
        outputs: list[Any] = []
        key, args = "", ()
        try:
            for (key, layer), args in zip(self._modules.items(), inputs):  # noqa: B007, B905
                outputs.append(entry(layer)(*args))
        except Exception as error:
            if not torch.compiler.is_compiling():  # Dynamo cannot trace it; a call that raises runs again uncompiled.
                locate(error, self, key, args)
            raise
        return outputs


PLAIN_CALLS = {nn.Module.__call__, Caller.__call__}  # Calls that add nothing to `forward` within a running call.


def entry(layer: nn.Module) -> Callable[..., Any]:
    """The shortest callable equivalent to calling the layer: `layer.forward` where nothing else is due.

    Without hooks `torch.nn.Module.__call__` comes down to `forward`. Calling that directly takes one frame per level
    of the tree instead of three, which is faster and lets trees be hundreds of levels deep.
    """
    state = layer.__dict__
    if (
        state.get("_forward_pre_hooks")
        or state.get("_forward_hooks")
        or state.get("_backward_pre_hooks")
        or state.get("_backward_hooks")
        or any(GLOBAL_HOOKS)
        or layer._compiled_call_impl is not None
        or type(layer).__call__ not in PLAIN_CALLS
        or torch.compiler.is_compiling()
    ):
        return layer
    return layer.forward
