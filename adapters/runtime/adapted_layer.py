"""`Adapted`, the node that stands where a layer was: the layer first, then one branch for each patch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

import fluxion as fl
from adapters.activation.active import active
from adapters.activation.mixed_batch import Rows, Weights
from adapters.activation.row_calls import run_rows
from adapters.adapter import Adapter, WeakSlots, base_modules
from adapters.errors import RowsError
from adapters.layers.kinds import CONVOLUTIONS
from adapters.layers.quantized import is_quantized
from adapters.layers.replace import substitute, with_parameters, with_weights
from adapters.layers.sharded import gather, is_sharded
from adapters.layers.weight import is_plain, is_stored, read_weight
from adapters.methods.core.method import Active, Branch
from adapters.runtime.compiled import number_of, strengths
from adapters.runtime.fast_path import FastPath
from adapters.runtime.merged_weights import Made, _merged, _parameter, adapted_weights
from adapters.runtime.placeholders import NoWeight, RowWeight
from adapters.runtime.transparency import ByName
from fluxion.chain import GLOBAL_HOOKS
from fluxion.module import Late, Template


class AdaptedLayer(fl.Chain, Adapter[nn.Module]):
    """A layer together with the branches of the patches that target it.

    It is transparent: attributes of the layer answer here, and the layer's entries in a state dict keep their names.
    """

    # The branches that are merged and how strongly; by the name of a weight, what it is without any, or the outcome
    # where the layer cannot hold it as a parameter. A structural copy, which has the same layer, has the same tables.
    _merged: Active
    _own: dict[str, Tensor | None]
    _computed: dict[str, Tensor | None]

    _load_state_dict_post_hooks = Late(lambda node: OrderedDict({-1: _finish_loading}))

    _tag = "ADAPTED"
    _may_repeat = True  # A shared layer is adapted once, by one node in all of its places.

    _fusion: FastPath | None  # The short way, as it was found last.
    _number: Tensor  # What compiled graphs know it by.

    def __init__(self, layer: nn.Module) -> None:
        # A model may get thousands of these: what the constructors make takes ten times as long as copies of it.
        _EMPTY.fill(self.__dict__)
        tables = {table: ByName(layer, table) for table in ("_parameters", "_buffers")}
        self.__dict__.update(
            tables,
            training=layer.training,
            _modules={type(layer).__name__: layer},
            _target=[layer],
            _outside=_NOWHERE,
            _merged=[],
            _own={},
            _computed={},
            _fusion=None,
            _number=number_of(self),
        )

    @property
    def base(self) -> nn.Module:
        """The layer itself, also when adapters written by hand are around it."""
        return self.target

    @property
    def inner(self) -> nn.Module:
        """The layer, inside of the adapters that were injected below this node."""
        return next(iter(self._modules.values()))

    def _heir(self) -> nn.Module:
        return self.base if self.inner is self.base else super()._heir()

    def _base_children(self) -> list[nn.Module | None]:
        return [self.inner]

    def _with(self, layer: nn.Module) -> nn.Module:
        """What is inside of this node, with another layer."""
        return substitute(self.inner, self.base, layer)

    @property
    def branches(self) -> list[Branch]:
        """One branch for each patch, in the order of injection."""
        return [child for child in self if isinstance(child, Branch)]

    def hold(self, name: str, branch: Branch) -> None:
        """Append a new branch, under a name like this one."""
        while name in self._modules or hasattr(type(self), name):
            name += "_"
        branch._set_parent(self)
        if branch.divided is not None:
            self.__dict__["_divided"] = branch.divided
        self._become({**self._modules, name: branch})  # Past the checks of what it is, and for other uses of the name.

    def release(self, branch: Branch) -> None:
        """Take a branch out."""
        self._become({key: child for key, child in self._modules.items() if child is not branch})
        branch._set_parent(None)

    def _become(self, children: dict[str, nn.Module]) -> None:
        """Have other children from now on, in a table of their own: calls in other threads are reading the old one."""
        self.__dict__["_modules"] = children
        self.__dict__["_fusion"] = None  # It would keep a branch that left.

    def divide(self, run: Callable[..., Any]) -> None:
        """From now on let it be computed by a function of this node and of the input."""
        self.__dict__["_divided"] = run
        for branch in self.branches:
            branch.divided = run

    @property
    def path(self) -> str:
        """The path of the layer in the model, as its patches know it."""
        return next((path for branch in self.branches if (path := branch.switch.path_of(branch))), "")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fusion": None, "_number": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_number"] = number_of(self)

    def chosen(self) -> Active | Rows:
        """Which branches act at the moment, and how strongly, or what is chosen for each row."""
        return active(self.branches)

    def _post_structural_copy(self, source: Adapter[nn.Module]) -> None:
        super()._post_structural_copy(source)
        shared = {name: vars(source)[name] for name in ("_merged", "_own", "_computed")}
        self.__dict__.update(shared, _fusion=None, _number=number_of(self))

    def _show_only_tag(self) -> bool:
        return True

    # Running

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # It provides no context, so a call of it is not a call of a tree. Nor is it one of a module where that would
        # come to the same: that takes longer.
        if is_compiling() or len(args) != 1 or kwargs:
            return nn.Module.__call__(self, *args, **kwargs)
        state = self.__dict__
        fusion: FastPath | None = state["_fusion"]
        if fusion is None or not fusion.holds(state):
            fusion = self._fuse()
        if fusion.is_covered(state):
            return nn.Module.__call__(self, *args, **kwargs)
        output = None if state["_merged"] else fusion.run(args[0])
        return self._run(args, kwargs) if output is None else output

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not args and "input" in kwargs:  # What torch's layers call it.
            args = (kwargs.pop("input"),)
        if is_compiling() and not torch.compiler.is_exporting() and args and self._is_traceable():
            return self._traced(*args, **kwargs)
        if (divided := self.__dict__.get("_divided")) is not None:
            return divided(self, *args, **kwargs)
        if len(args) == 1 and not kwargs and (output := self._short(args[0])) is not None:
            return output
        return self._run(args, kwargs)

    def _short(self, x: Any) -> Tensor | None:
        """The output in a few operations, None where there is no such way."""
        fusion = self._fusion
        if fusion is None or not fusion.holds(self.__dict__):
            fusion = self._fuse()
        return None if self._merged or any(GLOBAL_HOOKS) else fusion.run(x)

    def _fuse(self) -> FastPath:
        """Look at what there is."""
        fusion = FastPath(self, self.base)
        # A branch may have come or left meanwhile.
        self.__dict__["_fusion"] = fusion if fusion.holds(self.__dict__) else None
        return fusion

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output by the modules that there are."""
        chosen = self.chosen()
        if isinstance(chosen, Rows):
            try:
                return run_rows(chosen, self.base, self._of_row, args, kwargs)
            except RowsError as error:
                raise RowsError(error.reason, error.path or self.path) from None
        return self._compose(chosen)(*args, **kwargs)

    def _is_traceable(self) -> bool:
        """Whether every branch runs beside the layer, on each row by itself, so that one graph does for any choice."""
        if "_divided" in self.__dict__ or not is_plain(self.base) or self._merged:
            return False
        return all(b.bypass and b.names for b in self.branches)

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

    def _compose(self, active: Active) -> Callable[..., Any]:
        """The layer with these branches: some in its weights, then, from the inside out, those computed beside it.

        What has no form as a change of weights comes last, so that merging the others changes nothing.
        """
        outside = [item for item in active if not item[0].names]
        if outside:
            active = [*(item for item in active if item[0].names), *outside]
        inside = self._count_inside(active)
        merged = self._merged
        if not merged:
            weights = self._weights(active[:inside]) if inside else {}
        elif _uses(active[: len(merged)]) == _uses(merged) and inside <= len(merged):
            weights, inside = self._computed, len(merged)
        else:
            weights = self._weights(active[:inside])
        run: Callable[..., Any] = self._with(with_weights(self.base, weights)) if weights else self.inner
        for branch, scale in active[inside:]:
            run = partial(branch.method.run, branch, run, scale)
        return run

    def _count_inside(self, active: Active) -> int:
        """How many branches, from the first on, have to be computed in the weights."""
        plain = is_plain(self.base)
        count = 0
        for number, (branch, _) in enumerate(active, start=1):
            if not (branch.bypass and (plain or not branch.names)):
                count = number
        return count

    def _weights(self, active: Active) -> dict[str, Tensor | None]:
        """The weights that compute just these branches, where they are not those the layer has."""
        names = [name for branch, _ in (*self._merged, *active) for name in branch.names]
        return adapted_weights({name: self.own_weight(name) for name in names}, active)

    def _of_row(self, weights: Weights) -> Callable[..., Any]:
        """What computes the rows that made one choice."""
        return self._compose(
            [(branch, weights[branch.switch]) for branch in self.branches if weights.get(branch.switch)]
        )

    # The weights, for what reads them past `forward`, and merging

    @property
    def weight(self) -> Tensor:
        """The weight that computes what this node computes: the layer's own one while no patch acts."""
        return cast(Tensor, self._shown("weight"))

    def _shown(self, name: str) -> Tensor | None:
        """A parameter for who reads it past `forward`: in its codes, if it has some, while no branch changes it."""
        stored = self.base._parameters.get(name)
        if not is_quantized(stored) or isinstance(chosen := self.chosen(), Rows):
            return self.effective(name)
        untouched = all(branch.names and name not in branch.names for branch, _ in chosen)
        return stored if untouched else self.effective(name)

    def _may_change(self, name: str) -> bool:
        """Whether reading a parameter of the layer is of no use to who wants to compute what this node computes."""
        branches = self.branches
        if any(name in branch.names for branch in branches):
            return True
        return not all(branch.names for branch in branches) and self.base._parameters.get(name) is not None

    def effective(self, name: str) -> Tensor | None:
        """A parameter of the layer with what the branches make of it at the moment."""
        chosen = self.chosen()
        weight = read_weight(self.base, name)
        if weight is not None and isinstance(chosen, Rows):
            return weight.detach().as_subclass(RowWeight)
        if weight is not None and any(not branch.names for branch, _ in chosen):
            return weight.detach().as_subclass(NoWeight)
        if isinstance(chosen, Rows) or _uses(chosen) == _uses(self._merged):
            return self._computed.get(name, weight)
        return self._weights(chosen).get(name, weight)

    def own_weight(self, name: str) -> Tensor | None:
        """A weight of the layer without any branch, merged or not."""
        if name not in self._own:
            return read_weight(self.base, name)
        own = self._own[name]
        # While FSDP has gathered the parts of the layer's parameters, those that are kept are gathered too.
        return gather(own) if is_sharded(own) and not is_sharded(self.base._parameters.get(name)) else own

    def stored(self, name: str) -> Tensor | None:
        """A parameter of the layer, without what is merged into it, as it is stored: perhaps in codes."""
        return self._own[name] if name in self._own else self.base._parameters.get(name)

    @property
    def merged(self) -> Active:
        """The branches that the layer itself computes, and how strongly."""
        return list(self._merged)

    def is_merged(self, branch: Branch) -> bool:
        """Whether the layer itself computes this branch."""
        return any(item[0] is branch for item in self._merged)

    def kept(self) -> list[nn.Parameter]:
        """The layer's own weights that merged ones stand in for."""
        return [weight for weight in self._own.values() if isinstance(weight, nn.Parameter)]

    def merge(self, branches: Active, own: Mapping[str, Tensor | None] | None = None, made: Made | None = None) -> None:
        """Let the layer itself compute these branches, and no others, from now on.

        The layer gets new weights; its own ones are kept aside unwritten, so that nothing has to be undone.

        Args:
            branches: What to merge, and how strongly.
            own: Other weights to call the layer's own.
            made: Weights that were made for other layers: tied layers share theirs.
        """
        own = {**{name: self.own_weight(name) for name in self._names(self._merged)}, **(own or {})}
        own = {**{name: self.own_weight(name) for name in self._names(branches)}, **own}
        for name, weight in own.items():
            # A parameter in parts stays in its place, which FSDP knows, and is written to: so a copy is kept.
            if weight is not None and weight is self.base._parameters.get(name) and is_sharded(weight):
                own[name] = _parameter(cast(Tensor, weight).detach().clone(), weight)
        order = {_use(branch): place for place, branch in enumerate(self.branches)}
        branches = sorted(branches, key=lambda item: order.get(_use(item[0]), len(order)))
        outcome = self.folded(own, branches, made)
        for name, weight in own.items():
            table = self._computed
            if is_stored(self.base, name):
                self._set_parameter(name, cast("nn.Parameter | None", outcome.get(name, weight)))
                table = self._own
            table.pop(name, None)
        for name in outcome:  # A weight that is computed from others stays so, and the outcome is used instead.
            stored = is_stored(self.base, name)
            (self._own if stored else self._computed)[name] = own[name] if stored else outcome[name]
        self._merged[:] = branches

    def _set_parameter(self, name: str, weight: nn.Parameter | None) -> None:
        """Give the layer another parameter, or if it has it in parts other values."""
        there = self.base._parameters.get(name)
        if not is_sharded(there):
            self.base._parameters[name] = weight
        elif weight is not there:
            with torch.no_grad():
                there.copy_(weight)

    @staticmethod
    def _names(branches: Active) -> list[str]:
        return [name for branch, _ in branches for name in branch.names]

    @classmethod
    def folded(
        cls, own: Mapping[str, Tensor | None], branches: Active, made: Made | None = None
    ) -> dict[str, Tensor | None]:
        """Weights with branches folded in, as parameters of their own, or those made of the same before."""
        made = {} if made is None else made
        parts = tuple((scale, *map(id, branch.parameters())) for branch, scale in branches)
        sources = tuple(id(own[branch.parameter]) for branch, _ in branches)
        keys = {name: (id(own[name]), sources, parts, name) for name in cls._names(branches)}
        if not made.keys() >= set(keys.values()):
            with torch.no_grad():
                weights = _merged({name: own[name] for name in keys}, branches)
            for name, key in keys.items():
                like = own[name] if own[name] is not None else own[branches[0][0].parameter]
                made[key] = _parameter(weights[name], like)
        return {name: made[key] for name, key in keys.items()}

    # Transparency

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdaptedLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        # What the layer does not hold at the moment goes where the layer goes: to a device, or a dtype.
        for table in (self._own, self._computed):
            if table:
                holder = nn.Module()
                holder._parameters = cast("dict[str, nn.Parameter | None]", table)
                holder._apply(fn)
        return self

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
        if not name.startswith("_") and self._may_change(name):
            return self._shown(name)
        try:
            return super().__getattr__(name)
        except AttributeError:
            if "_target" not in self.__dict__ or name.startswith("__"):
                raise
            return getattr(self.inner, name)

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The entries of the layer under their own names, then those of the branches; shared ones in one place.

        What is merged is left out of them, for it is what the branches stand for.
        """
        if args:
            destination, prefix, keep_vars = (*args, prefix, keep_vars)[:3]
        inner = self._with(with_parameters(self.base, self._own)) if self._own else self.inner
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
        """Hand the layer its entries, which are under this node's name, and are of its own weights."""
        merged = self.merged
        self.merge([])
        first, *others = self._modules
        inside, branches = f"{prefix}{first}.", tuple(f"{prefix}{key}." for key in others)
        for key in [key for key in state_dict if key.startswith(prefix) and not key.startswith(branches)]:
            state_dict[inside + key.removeprefix(prefix)] = state_dict.pop(key)
        # A checkpoint of the base model says nothing of a branch, and is complete without.
        absent = tuple(branch for branch in branches if not any(key.startswith(branch) for key in state_dict))
        marks = [(names, len(names)) for names in (missing_keys, unexpected_keys, error_msgs)]
        self.__dict__["_loading"] = (inside, prefix, absent, marks, merged)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


_EMPTY = Template(fl.Chain())
_NOWHERE = WeakSlots()


def nodes(model: nn.Module) -> list[AdaptedLayer]:
    """The nodes in a model in order, each once. What patches have added is not looked through."""
    return [module for module in base_modules(model) if isinstance(module, AdaptedLayer)]


def is_merged_as(node: AdaptedLayer, active: Active) -> bool:
    """Whether what is merged into a layer is what is to act first."""
    merged = node.merged
    return _uses(active[: len(merged)]) == _uses(merged)


def _use(branch: Branch) -> object:
    """Equal for a branch and its structural copies: of one patch, a weight has one."""
    return branch.switch, branch.parameter


def _uses(active: Active) -> list[object]:
    return [(_use(branch), scale) for branch, scale in active]


def _finish_loading(node: AdaptedLayer, incompatible_keys: object) -> None:
    """Merge again what was merged, and give what was said of a layer during loading the layer's own names."""
    inside, prefix, absent, marks, merged = node.__dict__.pop("_loading")
    node.merge(merged)
    for said, start in marks:
        said[start:] = [text.replace(inside, prefix) for text in said[start:] if not text.startswith(absent)]
