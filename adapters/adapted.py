"""`Adapted`, the node that stands where a layer was: the layer first, then one branch for each patch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.activation import Rows, current
from adapters.adapter import Adapter
from adapters.errors import AdapterError
from adapters.method import Branch

Active = list[tuple[Branch, float]]
"""Branches that act, in the order of their injection, and how strongly."""


# Layers known to compute a linear function of their weight and nothing else.
_PLAIN_FORWARDS = frozenset({nn.Linear.forward, nn.Conv2d.forward})


class Adapted(fl.Chain, Adapter[nn.Module]):
    """A layer together with the branches of the patches that target it.

    It is transparent: attributes of the layer answer here, and the layer's entries in a state dict keep their names.
    """

    _tag = "ADAPTED"
    _may_repeat = True  # A shared layer is adapted once, by one node in all of its places.

    __call__ = nn.Module.__call__  # It provides no context, so a call of it is not a call of a tree.

    def __init__(self, layer: nn.Module) -> None:
        with self.setup_adapter(layer):
            super().__init__(layer)
        self.register_load_state_dict_post_hook(_finish_loading)  # type: ignore[no-untyped-call]
        self.training = layer.training
        # Weights merged into the layer: its own weight, to put back, and what has been folded in.
        self._own_weight: list[nn.Parameter] = []
        self._merged: Active = []

    @property
    def base(self) -> nn.Module:
        """The layer itself, also when adapters written by hand are around it."""
        return self.target

    @property
    def inner(self) -> nn.Module:
        """The layer, inside of the adapters that were injected below this node."""
        return next(iter(self._modules.values()))

    @property
    def branches(self) -> list[Branch]:
        """One branch for each patch, in the order of injection."""
        return [child for child in self if isinstance(child, Branch)]

    def _show_only_tag(self) -> bool:
        return True

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and "input" in kwargs:  # What torch's layers call it.
            args = (kwargs.pop("input"),)
        chosen = self._chosen()
        if isinstance(chosen, Rows):
            return self._run_rows(chosen, *args, **kwargs)
        return self._compose(chosen)(*args, **kwargs)

    def _chosen(self) -> Active | Rows:
        weights = current()
        active: Active = []
        for branch in self.branches:
            patch = branch.patch
            scale = weights.get(patch) if weights else None
            if scale is None:
                scale = patch.scale if patch.enabled else 0.0
            if isinstance(scale, Rows):
                return scale
            if scale != 0:
                active.append((branch, scale))
        return active

    def _compose(self, active: Active) -> Callable[..., Any]:
        """The layer with these branches around it, each taking the ones before it for its layer."""
        run, rest = self._merged_part(active)
        if rest and type(self.base).forward not in _PLAIN_FORWARDS:
            # What the layer computes from its weight is its own affair, so it gets the weight it would be merged to.
            return partial(self._run_with, adapted_weight(self.own_weight, active))
        for branch, scale in rest:
            run = partial(branch.run, run, scale)
        return run

    def _merged_part(self, active: Active) -> tuple[Callable[..., Any], Active]:
        """What computes the branches that are merged, and the branches that remain to be computed."""
        if not self._merged:
            return self.inner, active
        if active[: len(self._merged)] == self._merged:
            return self.inner, active[len(self._merged) :]
        # Something else is asked for than what is merged: compute with the layer's own weight.
        return partial(self._run_with, self._own_weight[0]), active

    def _run_with(self, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        name = next(name for name, module in self.inner.named_modules() if module is self.base)
        return torch.func.functional_call(self.inner, {f"{name}.weight".lstrip("."): weight}, args, kwargs)

    def _run_rows(self, rows: Rows, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.shape[0] != rows.count:
            raise AdapterError(
                f"rows= names {rows.count} rows, but a layer was given a batch of {x.shape[0]}: name each row once."
            )
        outputs = []
        for weights, indices in rows.groups:
            active = [(branch, weights[branch.patch]) for branch in self.branches if weights.get(branch.patch)]
            outputs.append(self._compose(active)(x[indices.to(x.device)], *args, **kwargs))
        return torch.cat(outputs)[rows.inverse.to(x.device)]

    # The weight, for what reads it past `forward`

    @property
    def weight(self) -> Tensor:
        """The weight that computes what this node computes: the layer's own one while no patch acts.

        Raises:
            AdapterError: Rows of a batch have different weights.
        """
        active = self._chosen()
        if isinstance(active, Rows):
            raise AdapterError("A layer that is read by its weight cannot have different adapters for each row.")
        if active == self._merged:
            return cast(Tensor, self.base.weight)
        return adapted_weight(self.own_weight, active)

    @property
    def own_weight(self) -> nn.Parameter:
        """The weight of the layer without any branch, merged or not."""
        return self._own_weight[0] if self._own_weight else cast(nn.Parameter, self.base.weight)

    @property
    def merged(self) -> Active:
        """The branches that the layer itself computes, and how strongly."""
        return list(self._merged)

    def merge(self, branches: Active, own: nn.Parameter | None = None) -> None:
        """Let the layer itself compute these branches, and no others, from now on.

        The layer gets a new weight; its own one is kept aside unwritten, so that nothing has to be undone.

        Args:
            branches: What to merge, and how strongly.
            own: Another weight to call the layer's own.
        """
        own, place = (
            self.own_weight if own is None else own,
            {id(branch): place for place, branch in enumerate(self.branches)},
        )
        branches = sorted(branches, key=lambda item: place[id(item[0])])
        self.base._parameters["weight"] = self.folded(own, branches) if branches else own
        self._own_weight, self._merged = [own] if branches else [], branches

    @staticmethod
    def folded(own: nn.Parameter, branches: Active) -> nn.Parameter:
        """A weight with branches folded in, as a parameter of its own."""
        with torch.no_grad():
            return nn.Parameter(adapted_weight(own, branches), requires_grad=own.requires_grad)

    # Transparency

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_target" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self.inner, name)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The entries of the layer under their own names, then those of the branches."""
        if args:
            destination, prefix, keep_vars = (*args, prefix, keep_vars)[:3]
        destination = self.inner.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key, child in list(self._modules.items())[1:]:
            child.state_dict(destination=destination, prefix=f"{prefix}{key}.", keep_vars=keep_vars)
        return destination

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Hand the layer its entries, which are under this node's name."""
        first, *others = self._modules
        inside, branches = f"{prefix}{first}.", tuple(f"{prefix}{key}." for key in others)
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(branches)]:
            state_dict[inside + key.removeprefix(prefix)] = state_dict.pop(key)
        # A checkpoint of the base model says nothing of a branch, and is complete without.
        absent = tuple(branch for branch in branches if not any(key.startswith(branch) for key in state_dict))
        marks = [(names, len(names)) for names in (missing_keys, unexpected_keys, error_msgs)]
        self.__dict__["_loading"] = (inside, prefix, absent, marks)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _finish_loading(node: nn.Module, incompatible_keys: object) -> None:
    """Give what was said of a layer while its node was loaded the layer's own names."""
    inside, prefix, absent, marks = node.__dict__.pop("_loading")
    for said, start in marks:
        said[start:] = [text.replace(inside, prefix) for text in said[start:] if not text.startswith(absent)]


def adapted_weight(weight: Tensor, active: Active) -> Tensor:
    """What a weight becomes by some branches, in its own dtype, computed in at least single precision."""
    result = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for branch, scale in active:
        result = branch.adapt(result, scale)
    return result.to(weight.dtype)
