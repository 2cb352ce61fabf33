"""`AdaptedLayer`, the node in the place of a layer: how its layer and its branches run together."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from adapters.activation.mixed_batch import Rows, Weights
from adapters.activation.row_calls import run_rows
from adapters.adapter import base_modules
from adapters.errors import RowsError
from adapters.layers.kinds import CONVOLUTIONS
from adapters.layers.replace import with_weights
from adapters.layers.weight import is_plain
from adapters.methods.core.method import Active
from adapters.runtime.compiled import strengths
from adapters.runtime.fast_path import FastPath
from adapters.runtime.transparency import TransparentNode


class AdaptedLayer(TransparentNode):
    """A layer together with the branches of the patches that target it, in the place of the layer.

    It is transparent: attributes of the layer answer here, and the layer's entries in a state dict keep their names.

    Example:
        >>> patch = adapters.inject(model, adapters.LoRA(rank=4), targets="Linear_1")
        >>> isinstance(model.Linear_1, adapters.AdaptedLayer), len(model.Linear_1.branches)
        (True, 1)
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # It provides no context, so a call of it is not a call of a tree.
        if len(args) == 1 and not kwargs and not is_compiling():
            output = self._run_fast(args[0])
            if output is not None:
                return output
        return nn.Module.__call__(self, *args, **kwargs)

    def _run_fast(self, x: Any) -> Tensor | None:
        """The output of the fast path, or None where it does not apply."""
        state = self.__dict__
        path: FastPath | None = state["_fast_path"]
        if path is None or not path.holds(state):
            path = state["_fast_path"] = FastPath(self, self.base)
            if not path.holds(state):  # There are hooks, or a branch came or left meanwhile.
                state["_fast_path"] = None
                return None
        return None if state["_merged"] else path.run(x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and "input" in kwargs:  # The name of the input in torch's layers.
            args = (kwargs.pop("input"),)
        if is_compiling() and not torch.compiler.is_exporting() and args and self._is_traceable():
            return self._traced(*args, **kwargs)
        if (tensor_parallel := self.__dict__.get("_tensor_parallel")) is not None:
            return tensor_parallel(self, *args, **kwargs)
        chosen = self.active_branches()
        if not isinstance(chosen, Rows):
            return self._compose(chosen)(*args, **kwargs)
        try:
            return run_rows(chosen, self.base, self._compose_row, args, kwargs)
        except RowsError as error:
            raise RowsError(error.reason, error.path or self.path) from None

    def _compose(self, active: Active) -> Callable[..., Any]:
        """The layer with these branches: some in its weights, then, from the inside out, those computed beside it.

        Branches that cannot be merged come last, so that merging the others changes nothing.
        """
        outside = [item for item in active if not item[0].changes]
        if outside:
            active = [*(item for item in active if item[0].changes), *outside]
        inside = self._count_inside(active)
        merged = self._merged
        if not merged:
            weights = self._weights(active[:inside]) if inside else {}
        elif self.is_merged_as(active) and inside <= len(merged):
            weights, inside = self._computed, len(merged)
        else:
            weights = self._weights(active[:inside])
        run: Callable[..., Any] = self._with(with_weights(self.base, weights)) if weights else self.inner
        for branch, scale in active[inside:]:
            run = partial(branch.method.run, branch, run, scale)
        return run

    def _compose_row(self, weights: Weights) -> Callable[..., Any]:
        """The layer with the branches of one choice of a mixed batch."""
        return self._compose(
            [(branch, weights[branch.switch]) for branch in self.branches if weights.get(branch.switch)]
        )

    def _count_inside(self, active: Active) -> int:
        """The number of branches, from the first on, that have to be computed in the weights."""
        plain = is_plain(self.base)
        count = 0
        for number, (branch, _) in enumerate(active, start=1):
            if not (branch.bypass and (plain or not branch.changes)):
                count = number
        return count

    # Compiled

    def _is_traceable(self) -> bool:
        """Whether every branch runs beside the layer, on each row by itself, so that one graph does for any choice."""
        if "_tensor_parallel" in self.__dict__ or not is_plain(self.base) or self._merged:
            return False
        return all(branch.bypass and branch.changes for branch in self.branches)

    def _traced(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """All branches, at the strengths that are looked up when the graph runs."""
        run: Callable[..., Any] = self.inner
        branches = self.branches
        if branches:
            dims = len(self.base.kernel_size) + 1 if isinstance(self.base, CONVOLUTIONS) else 1
            batch = x.detach() if x.ndim > dims or isinstance(self.base, nn.Embedding) else x.detach().unsqueeze(0)
            dtype = torch.float64 if self.base.weight.dtype == torch.float64 else torch.float32
            scales = strengths(batch, self._number, len(branches), dtype)
            for number, branch in enumerate(branches):
                run = partial(branch.method.run, branch, run, scales[:, number])
        return run(x, *args, **kwargs)


def nodes(model: nn.Module) -> list[AdaptedLayer]:
    """The adapted layers of a model in order, each once. Subtrees that patches added are not entered."""
    return [module for module in base_modules(model) if isinstance(module, AdaptedLayer)]
