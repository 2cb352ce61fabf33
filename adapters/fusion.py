"""The short way through a node: its layer and its branches in a few operations, past the modules they are made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

import fluxion as fl
from adapters.low_rank import Pair

if TYPE_CHECKING:
    from adapters.adapted import Active, Adapted
    from adapters.branch import Branch

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]


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


class Fusion:
    """What a node is made of, found once. What a user changes, hooks or puts over it is noticed in each call.

    Attributes:
        branches: The branches of the node.
        own: The parameters of the layer by name.
    """

    __slots__ = ("_children", "_parts", "_sizes", "_states", "_tables", "branches", "own")

    def __init__(self, node: Adapted) -> None:
        base, self.branches = node.base, node.branches
        self.own = base._parameters
        self._children = tuple(node._modules.values())
        fits = node.inner is base and type(base).forward is nn.Linear.forward
        thin = {b: parts for b in self.branches if fits and b.beside and (parts := b.method.thin(b)) is not None}
        # Their `__dict__`s: attributes of what has a `__getattr__` take five times as long.
        inside = {b: [None if part is None else vars(part) for part in (b, *parts)] for b, parts in thin.items()}
        self._states = [vars(base), *(state for states in inside.values() for state in states if state is not None)]
        self._sizes = sum(map(len, self._states))
        self._tables = [*_GLOBAL_HOOKS, *(state[name] for state in self._states for name in _HOOKS if name in state)]
        over = any(state.get("forward") or state.get("_compiled_call_impl") for state in self._states)
        self._parts: dict[Branch, Any] = {}
        if not over:
            self._parts = {b: (tuple(b._modules.values()), *states) for b, states in inside.items()}

    def holds(self, state: dict[str, Any]) -> bool:
        """Whether a node has the same children, and all of them as many attributes: a table for hooks is one more."""
        return tuple(state["_modules"].values()) == self._children and sum(map(len, self._states)) == self._sizes

    def pairs(self, active: Active) -> list[Pair] | None:
        """What these branches compute beside the layer; None if there is one that has to run by itself."""
        if any(self._tables):
            return None
        pairs: list[Pair] = []
        for branch, scale in active:
            if (known := self._parts.get(branch)) is None:
                return None
            children, own, down, up, multiply, dropout = known
            downs, ups = down["_parameters"], up["_parameters"]
            a, b = downs.get("weight"), ups.get("weight")
            if (
                tuple(own["_modules"].values()) != children
                or type(a) is not nn.Parameter
                or type(b) is not nn.Parameter
                or downs["bias"] is not None
                or ups["bias"] is not None
            ):
                return None
            if multiply is not None:
                if multiply["bias"]:
                    return None
                scale *= multiply["scale"]
            pairs.append((a, b, scale, dropout["p"] if dropout is not None and dropout["training"] else 0.0))
        return pairs
