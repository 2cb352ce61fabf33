"""`Node`, the structure of an adapted layer: the layer as the first child, then one branch for each patch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

import fluxion as fl
from adapters.activation.active import active
from adapters.activation.mixed_batch import Rows
from adapters.adapter import Adapter, WeakSlots
from adapters.layers.replace import substitute
from adapters.methods.core.method import Active, Branch
from adapters.runtime.compiled import number_of
from adapters.runtime.fast_path import FastPath
from adapters.runtime.tables import ByName
from fluxion.copying import Template


class Node(fl.Chain, Adapter[nn.Module]):
    """A layer and its branches."""

    # The branches that are merged, with their strengths; by the name of a weight, the base weight that a merged one
    # displaced, or the merged weight where the layer cannot hold it as a parameter. A structural copy, which has the
    # same layer, has the same tables.
    _merged: Active
    _displaced: dict[str, Tensor | None]
    _computed: dict[str, Tensor | None]

    _tag = "ADAPTED"
    _may_repeat = True  # A shared layer is adapted once, by one node in all of its slots.

    _fast_path: FastPath | None  # As it was found last.
    _number: Tensor  # The key of the node in compiled graphs.

    def __init__(self, layer: nn.Module) -> None:
        # A model may get thousands of these: what the constructors make takes ten times as long as copies of it.
        _EMPTY.fill(self.__dict__)
        self.__dict__.update(
            {table: ByName(layer, table) for table in ("_parameters", "_buffers")},
            training=layer.training,
            _modules={type(layer).__name__: layer},
            _target=[layer],
            _outside=_NOWHERE,
            _merged=[],
            _displaced={},
            _computed={},
            _fast_path=None,
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

    @property
    def branches(self) -> list[Branch]:
        """One branch for each patch, in the order of injection."""
        return [child for child in self if isinstance(child, Branch)]

    @property
    def path(self) -> str:
        """The path of the layer in the model, as its patches know it."""
        return next((path for branch in self.branches if (path := branch.switch.path_of(branch))), "")

    def active_branches(self) -> Active | Rows:
        """The active branches with their strengths, in this thread or task, or the choice for each row."""
        return active(self.branches)

    def add_branch(self, name: str, branch: Branch) -> None:
        """Append a new branch under a name, made unique by underscores."""
        while name in self._modules or hasattr(type(self), name):
            name += "_"
        branch._set_parent(self)
        if branch.tensor_parallel is not None:
            self.__dict__["_tensor_parallel"] = branch.tensor_parallel
        # Past the checks of `append`. The name of a branch that left may be used again.
        self._set_children({**self._modules, name: branch})

    def remove_branch(self, branch: Branch) -> None:
        """Take a branch out."""
        self._set_children({key: child for key, child in self._modules.items() if child is not branch})
        branch._set_parent(None)

    def _set_children(self, children: dict[str, nn.Module]) -> None:
        """Replace the table of children, which calls in other threads may be reading."""
        self.__dict__["_modules"] = children
        self.__dict__["_fast_path"] = None  # It would keep a branch that left.

    def set_tensor_parallel(self, run: Callable[..., Any]) -> None:
        """Replace the forward by a tensor-parallel one, a function of this node and of the input."""
        self.__dict__["_tensor_parallel"] = run
        for branch in self.branches:
            branch.tensor_parallel = run

    def _with(self, layer: nn.Module) -> nn.Module:
        """The inner layer around another base layer."""
        return substitute(self.inner, self.base, layer)

    def _heir(self) -> nn.Module:
        return self.base if self.inner is self.base else super()._heir()

    def _base_children(self) -> list[nn.Module | None]:
        return [self.inner]

    def _show_only_tag(self) -> bool:
        return True

    # Copies

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_fast_path": None, "_number": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__["_number"] = number_of(self)

    def _post_structural_copy(self, source: Adapter[nn.Module]) -> None:
        super()._post_structural_copy(source)
        shared = {name: vars(source)[name] for name in ("_merged", "_displaced", "_computed")}
        self.__dict__.update(shared, _fast_path=None, _number=number_of(self))


_EMPTY = Template(fl.Chain())
_NOWHERE = WeakSlots()
