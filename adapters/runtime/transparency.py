"""`TransparentNode`, a node that answers for its layer: by attributes, module names and the entries of a state dict."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from adapters.layers.replace import with_parameters
from adapters.methods.core.method import Branch
from adapters.runtime.merging import MergingNode
from fluxion.copying import lazy_attribute


class TransparentNode(MergingNode):
    """A node whose layer keeps its names."""

    _load_state_dict_post_hooks = lazy_attribute(lambda node: OrderedDict({-1: _finish_loading}))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and self._may_change(name):
            return self._shown(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_target" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self.inner, name)

    def named_modules(self, memo: Any = None, prefix: str = "", remove_duplicate: bool = True) -> Any:
        """This node, then the layer under the name of this node, so that its parameters keep their names."""
        memo = set() if memo is None else memo
        if remove_duplicate and self in memo:
            return
        memo.add(self)
        yield prefix, self
        first, *others = self._modules.items()
        yield from first[1].named_modules(memo, prefix, remove_duplicate)
        for key, child in others:
            yield from child.named_modules(memo, f"{prefix}.{key}".lstrip("."), remove_duplicate)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The entries of the layer under their own names, then those of the branches; shared ones in one place.

        The layer's weights are those of the base: merged branches have entries of their own.
        """
        if args:
            destination, prefix, keep_vars = (*args, prefix, keep_vars)[:3]
        inner = self._with(with_parameters(self.base, self._displaced)) if self._displaced else self.inner
        destination = inner.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
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
        """Hand the layer its entries, which have the prefix of this node, and are of its base weights."""
        merged = self.merged
        self.merge([])
        first, *others = self._modules
        inside, branches = f"{prefix}{first}.", tuple(f"{prefix}{key}." for key in others)
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(branches)]:
            state_dict[inside + key.removeprefix(prefix)] = state_dict.pop(key)
        # A checkpoint of the base model has no entries for a branch, and is complete without.
        absent = tuple(branch for branch in branches if not any(key.startswith(branch) for key in state_dict))
        marks = [(names, len(names)) for names in (missing_keys, unexpected_keys, error_msgs)]
        self.__dict__["_loading"] = (inside, prefix, absent, marks, merged)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


def _finish_loading(node: TransparentNode, incompatible_keys: object) -> None:
    """Merge again what was merged, and give the keys that loading has reported the prefix of the layer."""
    inside, prefix, absent, marks, merged = node.__dict__.pop("_loading")
    node.merge(merged)
    for reported, start in marks:
        reported[start:] = [key.replace(inside, prefix) for key in reported[start:] if not key.startswith(absent)]
