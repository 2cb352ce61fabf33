"""`Adapted`, the node that stands where a layer was: the layer first, then one branch for each patch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.adapter import Adapter
from adapters.choice import Rows, RowWeight, Weights, current
from adapters.errors import RowsError
from adapters.layers import is_plain, is_stored, read_weight, substitute
from adapters.method import Branch

Active = list[tuple[Branch, float]]
"""Branches that act, in the order of their injection, and how strongly."""
Made = dict[object, nn.Parameter]
"""Weights with branches folded in, by what they were made of."""


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
        self.__dict__.update({table: ByName(layer, table) for table in ("_parameters", "_buffers")})
        self.register_load_state_dict_post_hook(_finish_loading)  # type: ignore[no-untyped-call]
        self.training = layer.training
        # By the name of the weight: what it is without any branch, the branches that are merged into it and how
        # strongly, and the outcome where the layer cannot hold it as a parameter.
        self._own: dict[str, Tensor] = {}
        self._merged: dict[str, Active] = {}
        self._computed: dict[str, Tensor] = {}

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

    @property
    def path(self) -> str:
        """The path of the layer in the model, as its patches know it."""
        return next(place.path for branch in self.branches for place in branch.patch.places if place.branch is branch)

    def _show_only_tag(self) -> bool:
        return True

    # Running

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and "input" in kwargs:  # What torch's layers call it.
            args = (kwargs.pop("input"),)
        chosen = self._chosen()
        if isinstance(chosen, Rows):
            try:
                return chosen.run(self.base, self._of_row, args, kwargs)
            except RowsError as error:
                raise RowsError(error.reason, error.path or self.path) from None
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
        """The layer with these branches: around it where their updates add up in its output, else in its weights."""
        run: Callable[..., Any] = self.inner
        around = active
        if self._merged or (active and not self._adds_up(active)):
            weights, around = self._weights(active)
            if weights:
                run = substitute(self.inner, self.base, weights)
        for branch, scale in around:
            run = partial(branch.run, run, scale)
        return run

    def _adds_up(self, active: Active) -> bool:
        return is_plain(self.base) and all(branch.parameter == "weight" for branch, _ in active)

    def _weights(self, active: Active) -> tuple[dict[str, Tensor], Active]:
        """Weights that the layer has to be given, and the branches that remain to be computed around it."""
        weights: dict[str, Tensor] = {}
        around: Active = []
        for name in dict.fromkeys((*self._merged, *(branch.parameter for branch, _ in active))):
            merged = self._merged.get(name, [])
            wanted = [item for item in active if item[0].parameter == name]
            rest = wanted[len(merged) :]
            plain = name == "weight" and is_plain(self.base)
            if wanted[: len(merged)] == merged and (plain or not rest):
                around += rest
                weights.update({name: self._computed[name]} if name in self._computed else {})
            else:
                weights[name] = adapted_weight(self.own_weight(name), wanted)
        return weights, around

    def _of_row(self, weights: Weights) -> Callable[..., Any]:
        """What computes the rows that made one choice."""
        return self._compose([(branch, weights[branch.patch]) for branch in self.branches if weights.get(branch.patch)])

    # The weights, for what reads them past `forward`, and merging

    @property
    def weight(self) -> Tensor:
        """The weight that computes what this node computes: the layer's own one while no patch acts."""
        return self._effective("weight")

    def _effective(self, name: str) -> Tensor:
        chosen = self._chosen()
        if isinstance(chosen, Rows):
            return read_weight(self.base, name).detach().as_subclass(RowWeight)
        active = [item for item in chosen if item[0].parameter == name]
        if active == self._merged.get(name, []):
            return self._computed[name] if name in self._computed else read_weight(self.base, name)
        return adapted_weight(self.own_weight(name), active)

    def own_weight(self, name: str) -> Tensor:
        """A weight of the layer without any branch, merged or not."""
        return self._own[name] if name in self._own else read_weight(self.base, name)

    def merged(self, name: str) -> Active:
        """The branches that the layer itself computes in a weight, and how strongly."""
        return list(self._merged.get(name, []))

    def is_merged(self, branch: Branch) -> bool:
        """Whether the layer itself computes this branch."""
        return any(item[0] is branch for item in self._merged.get(branch.parameter, []))

    def kept(self) -> list[nn.Parameter]:
        """The layer's own weights that merged ones stand in for."""
        return [weight for weight in self._own.values() if isinstance(weight, nn.Parameter)]

    def merge(self, name: str, branches: Active, own: Tensor | None = None, made: Made | None = None) -> None:
        """Let the layer itself compute these branches in a weight, and no others, from now on.

        The layer gets a new weight; its own one is kept aside unwritten, so that nothing has to be undone.

        Args:
            name: The weight.
            branches: What to merge, and how strongly.
            own: Another weight to call the layer's own.
            made: Weights that were made for other layers: tied layers share theirs.
        """
        own = self.own_weight(name) if own is None else own
        order = self.branches
        branches = sorted(branches, key=lambda item: order.index(item[0]))
        outcome = self.folded(own, branches, made) if branches else own
        if is_stored(self.base, name):
            self.base._parameters[name] = cast(nn.Parameter, outcome)
            _set(self._own, name, own if branches else None)
        else:  # Computed from others: it stays so, and the outcome is used instead.
            _set(self._computed, name, outcome if branches else None)
        _set(self._merged, name, branches or None)

    @staticmethod
    def folded(own: Tensor, branches: Active, made: Made | None = None) -> nn.Parameter:
        """A weight with branches folded in, as a parameter of its own, or the one made of the same before."""
        made = {} if made is None else made
        parts = (id(own), *((scale, *map(id, branch.parameters())) for branch, scale in branches))
        if parts not in made:
            with torch.no_grad():
                weight = adapted_weight(own, branches).contiguous()
            made[parts] = nn.Parameter(weight, requires_grad=own.requires_grad)
        return made[parts]

    # Transparency

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """This node, then the layer under this node's own name, so that its parameters keep their names."""
        memo = set() if memo is None else memo
        if remove_duplicate and self in memo:
            return
        memo.add(self)
        yield prefix, self
        first, *others = self._modules.items()
        yield from first[1].named_modules(memo, prefix, remove_duplicate)
        for key, child in others:
            yield from child.named_modules(memo, f"{prefix}.{key}".lstrip("."), remove_duplicate)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and any(branch.parameter == name for branch in self.branches):
            return self._effective(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_target" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self.inner, name)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The entries of the layer under their own names, then those of the branches; shared ones in one place."""
        if args:
            destination, prefix, keep_vars = (*args, prefix, keep_vars)[:3]
        destination = self.inner.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for key, child in list(self._modules.items())[1:]:
            if isinstance(child, Branch) and child.tied:
                continue
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


class ByName(dict[str, Any]):
    """The parameters or buffers of a node's layer, for what asks a node by name, such as `torch.func.functional_call`.

    Listed there are none: the layer lists its own.
    """

    def __init__(self, layer: nn.Module, table: str) -> None:
        self.layer, self.table = layer, table

    @property
    def _entries(self) -> dict[str, Any]:
        return cast(dict[str, Any], getattr(self.layer, self.table))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __reduce__(self) -> tuple[type[ByName], tuple[nn.Module, str]]:
        return ByName, (self.layer, self.table)


def _set(table: dict[str, Any], name: str, value: Any) -> None:
    if value is None:
        table.pop(name, None)
    else:
        table[name] = value


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
