"""The short way through a node: its layer and its branches in a few operations, past the modules they are made of."""

from __future__ import annotations

from typing import Any, NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor, nn

from adapters.activation.active import strength
from adapters.activation.context import current
from adapters.activation.mixed_batch import Rows
from adapters.activation.switch import Switch
from adapters.lowrank.linear import Pair, is_ready, linear, linear_of_rows
from adapters.lowrank.thin import Thin
from adapters.methods.core.method import Branch
from fluxion.chain import GLOBAL_HOOKS, PLAIN_CALLS

# What makes a call of a module more than its class says, if there is something in one of these attributes.
_COVERS = (
    *("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks"),
    *("forward", "_compiled_call_impl"),
)
_NUMBERS = (float, int)
_FORWARD = nn.Linear.forward
State = dict[str, Any]
"""The `__dict__` of a module. To look at its attributes themselves takes five times as long."""


class FastPath:
    """What a node is made of, found once. What a user changes, hooks or puts over it is noticed in each call."""

    def __init__(self, node: nn.Module, layer: nn.Module) -> None:
        self._children = [*node._modules.values()]  # Looked at once: others may come meanwhile.
        self._layer = layer
        self._base, self._own = vars(layer), layer._parameters
        self._fits = self._children[0] is layer and type(layer).__call__ in PLAIN_CALLS
        self._size, self._base_size = len(vars(node)), len(self._base)  # A table for hooks that is new is one more.
        self._checked, self._base_checked = _covers(vars(node), "_divided"), _covers(self._base)
        self._branches = [(child, child.switch) for child in self._children if isinstance(child, Branch)]
        self._of_patch: dict[Switch, list[Branch]] = {}
        for branch, _ in self._branches:
            self._of_patch.setdefault(branch.switch, []).append(branch)
        self._parts: dict[Branch, _Parts | None] = {}  # Of those that have acted: hundreds may never do.
        self._of_rows: _OfRows | None = None

    def holds(self, state: State) -> bool:
        """Whether a node, of this `__dict__`, has the same children, and neither it nor its layer other attributes."""
        return (
            len(state) == self._size
            and len(self._base) == self._base_size
            and [*state["_modules"].values()] == self._children
        )

    def is_covered(self, state: State) -> bool:
        """Whether there is more to a call of the node than what it computes."""
        return any(GLOBAL_HOOKS) or (bool(self._checked) and any(map(state.get, self._checked)))

    def run(self, x: Any) -> Tensor | None:
        """The output of the node for an input; None if the layer or a branch that acts has to run by itself."""
        weight: Any = self._own.get("weight")
        bias: Any = self._own.get("bias", self)  # It may be computed, or a buffer.
        if (
            type(self._layer).forward is not _FORWARD
            or any(map(self._base.get, self._base_checked))
            or not is_ready(x, weight, bias)
        ):
            return None
        choice = current()
        pairs: list[Pair] = []
        for branch, patch in self._branches:
            scale = strength(patch, choice)
            if isinstance(scale, Rows):
                return self._run_rows(scale, x, weight, bias)
            if scale:
                if (parts := self._look(branch)) is None:
                    return None
                pairs.append((parts.down, parts.up, scale * parts.factor, parts.dropout))
        if not pairs or (len(pairs) > 1 and any(pair[3] for pair in pairs)):  # Each drops inputs of its own.
            return None
        return linear(x, weight, bias, pairs)

    def _run_rows(self, rows: Rows, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
        """The same where each row of the input has a choice of its own."""
        found = self._of_rows
        if found is None or found.rows() is not rows or not all(map(_Parts.hold, found.parts)):
            found = self._of_rows = self._divide(rows)
        if found is None or len(x) != rows.count:
            return None
        if torch.is_grad_enabled():
            every = (tensor for parts in found.parts for tensor in (parts.down, parts.up))
            if any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, *every)):
                return None
        return linear_of_rows(x, weight, bias, rows, found.pairs)

    def _divide(self, rows: Rows) -> _OfRows | None:
        """What the node computes for these rows; None if a branch that acts on some has to run by itself."""
        acting: list[_Parts] = []
        found: list[list[Pair]] = []
        for weights, _ in rows.groups:
            pairs: list[Pair] = []
            for patch, scale in weights.items():
                for branch in self._of_patch.get(patch, ()) if scale else ():
                    if (parts := self._look(branch)) is None or parts.dropout:
                        return None
                    pairs.append((parts.down, parts.up, scale * parts.factor, 0.0))
                    acting.append(parts)
            found.append(pairs)
        return _OfRows(ref(rows), acting, found)

    def _look(self, branch: Branch) -> _Parts | None:
        """The parts of a branch that adds the product of two thin matrices; None if that is not all it does."""
        parts = self._parts.get(branch)
        if parts is None or not parts.hold():
            thin = branch.method.thin(branch) if self._fits and branch.bypass else None
            parts = None if thin is None else _Parts(branch, thin)
            parts = self._parts[branch] = parts if parts is not None and parts.are_plain() and parts.hold() else None
        return parts


def _covers(state: State, *more: str) -> list[str]:
    """Where something would be that makes a call of a module, of this `__dict__`, more than its class says."""
    return [name for name in (*_COVERS, *more) if name in state]


class _Parts:
    """A branch and the modules in it, as they were when they were looked at.

    Attributes:
        down: A.
        up: B.
        factor: What their product is multiplied by.
        dropout: The probability of dropping each input of A.
    """

    def __init__(self, branch: Branch, thin: Thin) -> None:
        self._states = [vars(part) for part in (branch, *thin) if part is not None]
        self._sizes = [*map(len, self._states)]  # A table for hooks that is new is one more.
        self._checked = [(state, name) for state in self._states for name in _covers(state)]
        self._branch, self._children = vars(branch), [*branch._modules.values()]
        self._downs, self._ups = thin.down._parameters, thin.up._parameters
        self.down, self.up = (cast(Tensor, table.get("weight")) for table in (self._downs, self._ups))
        self._multiply, self._dropout = (None if part is None else vars(part) for part in thin[2:])
        multiply, dropout = self._multiply or {"scale": 1.0, "bias": 0.0}, self._dropout or {"p": 0.0}
        self.factor, self._offset = (cast(float, multiply.get(name)) for name in ("scale", "bias"))
        self._rate, self._training = cast(float, dropout.get("p")), dropout.get("training")
        self.dropout = self._rate if self._training else 0.0

    def are_plain(self) -> bool:
        """Whether they are of the kinds that make up two thin matrices: a number may be a tensor, for one."""
        return (
            type(self.down) is type(self.up) is nn.Parameter
            and type(self.factor) in _NUMBERS
            and type(self._offset) in _NUMBERS
            and self._offset == 0
            and 0 <= self.dropout < 1
        )

    def hold(self) -> bool:
        """Whether all is as it was, and there are no hooks."""
        downs, ups, multiply, dropout = self._downs, self._ups, self._multiply, self._dropout
        return (
            [*map(len, self._states)] == self._sizes
            and [*self._branch["_modules"].values()] == self._children
            and not (self._checked and any(state.get(name) for state, name in self._checked))
            and downs.get("weight") is self.down
            and ups.get("weight") is self.up
            and downs.get("bias", self) is ups.get("bias", self) is None  # Nor is one that is no parameter.
            and (multiply is None or (multiply.get("scale") is self.factor and multiply.get("bias") is self._offset))
            and (dropout is None or (dropout.get("p") is self._rate and dropout.get("training") is self._training))
        )


class _OfRows(NamedTuple):
    """What a node computes for rows that have choices of their own.

    Attributes:
        rows: The choices, as long as there are any.
        parts: Those of the branches that act.
        pairs: For each group of rows what is computed beside the layer.
    """

    rows: ref[Rows]
    parts: list[_Parts]
    pairs: list[list[Pair]]
