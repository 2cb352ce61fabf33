"""The short way through a node: its layer and its branches in a few operations, past the modules they are made of."""

from __future__ import annotations

from operator import getitem
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from torch import nn

import fluxion as fl
from adapters.branch import Branch
from adapters.low_rank import Pair
from fluxion.chain import GLOBAL_HOOKS, PLAIN_CALLS

if TYPE_CHECKING:
    from adapters.adapted import Active, Adapted
    from adapters.choice import Rows
    from adapters.patch import Patch

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_NUMBERS = (float, int)
_FORWARD = nn.Linear.forward


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

    __slots__ = ("_children", "_fits", "_layer", "_of_patch", "_parts", "branches", "own")

    def __init__(self, node: Adapted) -> None:
        self._layer = base = node.base
        self.own = base._parameters
        self._children = tuple(node._modules.values())  # Looked at once: others may come meanwhile.
        self.branches = [child for child in self._children if isinstance(child, Branch)]
        self._fits = self._children[0] is base and type(base).__call__ in PLAIN_CALLS
        self._parts: dict[Branch, _Parts | None] = {}  # Of those that have acted: there may be hundreds that never do.
        self._of_patch: dict[Patch, list[Branch]] = {}
        for branch in self.branches:
            self._of_patch.setdefault(branch.patch, []).append(branch)

    def holds(self, state: dict[str, Any]) -> bool:
        """Whether a node, whose `__dict__` this is, has the same children."""
        return tuple(state["_modules"].values()) == self._children

    def pairs(self, active: Active) -> list[Pair] | None:
        """What these branches compute beside the layer; None if there is one that has to run by itself."""
        return self._pairs(active) if self._is_plain() else None

    def _is_plain(self) -> bool:
        """Whether it is torch's code that runs in the layer, if there is nothing in the way of an object's own."""
        return (
            type(self._layer).forward is _FORWARD
            and "bias" in self.own  # Otherwise it may be computed, or a buffer.
            and not any(GLOBAL_HOOKS)
        )

    def _pairs(self, active: Active) -> list[Pair] | None:
        pairs: list[Pair] = []
        for branch, scale in active:
            if branch not in self._parts:
                self._parts[branch] = _Parts.of(self._layer, branch) if self._fits and branch.beside else None
            if (parts := self._parts[branch]) is None:
                return None
            pair = parts.pair(scale)
            if pair is None:  # It is not what it was: perhaps in a way that makes no difference.
                if (parts := _Parts.of(self._layer, branch)) is None or (pair := parts.pair(scale)) is None:
                    return None
                self._parts[branch] = parts
            pairs.append(pair)
        return pairs

    def pairs_of_rows(self, rows: Rows) -> list[tuple[int, list[Pair]]] | None:
        """For each group of rows their number and what is computed beside the layer; None if that is another way."""
        if not self._is_plain():
            return None
        found: list[tuple[int, list[Pair]]] = []
        for weights, indices in rows.groups:
            active = [(b, scale) for patch, scale in weights.items() if scale for b in self._of_patch.get(patch, ())]
            if (pairs := self._pairs(active)) is None:
                return None
            found.append((indices.shape[0], pairs))
        return found


class _Parts:
    """A layer, a branch and what is in it, by their `__dict__`s: attributes of modules take five times as long."""

    __slots__ = ("_all", "_children", "_count", "_covered", "_states", "_tables")

    def __init__(self, layer: nn.Module, branch: Branch, thin: Thin) -> None:
        self._states = [None if part is None else vars(part) for part in (branch, *thin)]
        self._all = [vars(layer), *(state for state in self._states if state is not None)]
        self._count = sum(map(len, self._all))
        self._children = tuple(branch._modules.values())
        tables = [(state, name) for state in self._all for name in _HOOKS if name in state]
        self._tables = [state for state, _ in tables], [name for _, name in tables]
        # One may be called in another way than torch's.
        self._covered = any("forward" in state or "_compiled_call_impl" in state for state in self._all)

    @classmethod
    def of(cls, layer: nn.Module, branch: Branch) -> _Parts | None:
        """Those of a branch that adds the product of two thin matrices."""
        thin = branch.method.thin(branch)
        return None if thin is None else cls(layer, branch, thin)

    def pair(self, scale: float) -> Pair | None:
        """What a branch, of these modules, computes at the moment; None if it was given what it is not made of."""
        own, down, up, multiply, dropout = self._states
        downs, ups = down["_parameters"], up["_parameters"]  # type: ignore[index]
        a, b = downs.get("weight"), ups.get("weight")
        if (
            self._covered
            or sum(map(len, self._all)) != self._count  # A table for hooks that is new is one attribute more.
            or any(map(getitem, *self._tables))  # As fast as a loop over as many lookups can be.
            or tuple(own["_modules"].values()) != self._children  # type: ignore[index]
            or type(a) is not nn.Parameter
            or type(b) is not nn.Parameter
            or downs.get("bias", downs) is not None  # Nor is one that is no parameter.
            or ups.get("bias", ups) is not None
        ):
            return None
        if multiply is not None:
            factor, bias = multiply.get("scale"), multiply.get("bias")
            if type(factor) not in _NUMBERS or type(bias) not in _NUMBERS or bias:
                return None
            scale *= cast(float, factor)
        rate = dropout["p"] if dropout is not None and dropout["training"] else 0.0
        return (a, b, scale, rate) if 0 <= rate < 1 else None
