"""`Method`, the hyperparameters and the formula, and `Branch`, its tensors at one weight."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.activation.switch import Switch
from adapters.layers.matrix import Matrix
from adapters.layers.sharded import gather
from adapters.lowrank.thin import Thin
from adapters.methods.core.arithmetic import Scale, lerp
from adapters.methods.core.spec import WeightSpec


class Tensors(Mapping[str, Tensor]):
    """The tensors of a branch by name, as attributes and as items, all in one dtype.

    Attributes:
        matrix: What the weight is as a matrix.
    """

    def __init__(self, tensors: Mapping[str, Tensor], matrix: Matrix) -> None:
        self._tensors = tensors
        self.matrix = matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix, `(outputs, inputs)`, with the experts in front for a stack."""
        return self.matrix.shape

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise AttributeError(f"There is no tensor {name!r}, only {', '.join(self._tensors)}.") from None

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


class Branch(fl.Chain):
    """The part of one patch at one weight of a layer: the tensors, and what the method makes of them.

    Attributes:
        method: The hyperparameters and the formula.
        matrix: What the weight is as a matrix; `Matrix.whole` where the method changes no weight.
        parameter: The name of the weight in its layer.
        names: The parameters of the layer that the branch changes, the weight first. None for a method that has no
            form as a change of weights.
        beside: Whether the method computes it beside the layer, if that is linear in its weight.
        common: The names of the tensors that all branches of the method share, in the patch.
        constants: The names of parameters that are never trained.
        switch: The activation state of its patch.
        tied: Whether its tensors are those of another branch, at another use of the same weight.
        divided: What computes the node it is in, if its tensors are divided with the layer's on several processes.
    """

    _tag = ""  # It is that of the method, in the label.

    method: Method
    matrix: Matrix
    parameter: str
    names: tuple[str, ...]
    bypass: bool
    common: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()
    switch: Switch
    tied: bool = False
    divided: Callable[..., Any] | None = None

    def change(self, weights: Mapping[str, Tensor | None], scale: float) -> dict[str, Tensor | None]:
        """The weights of a layer that computes what the layer of these weights and this branch compute together.

        Args:
            weights: By name, in the precision to compute in, each of its own shape. They are not changed.
            scale: The strength, 1 for the method as its paper states it.
        """
        changed = dict(weights)
        weight = weights[self.parameter]
        if weight is None or not self.names:
            return changed
        tensors, matrix = self.values(weight.dtype), self.matrix.read(weight)
        changed[self.parameter] = self.matrix.write(self.method.change(matrix, tensors, scale), like=weight)
        for name in self.names[1:]:
            bias, updated = weights[name], self.method.update_bias(weights[name], matrix, tensors)
            if updated is not None:
                changed[name] = (torch.zeros_like(updated) if bias is None else bias).lerp(updated, scale)
        return changed

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; those of a layer of this chain that has just a weight by the name of the layer."""
        named = (*self.named_parameters(), *self.named_buffers())
        return {name.removesuffix(".weight"): tensor for name, tensor in named}

    def shared_tensors(self) -> dict[str, Tensor]:
        """The tensors that it has in common with the other branches of its method."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None and name in self.common}

    def values(self, dtype: torch.dtype | None = None) -> Tensors:
        """The tensors as a formula takes them, whole where several processes have them in parts.

        Args:
            dtype: What to convert floating-point ones to; by default they stay as they are, but for those that are
                shared with layers on other devices or in other dtypes.
        """
        tensors = {name: gather(tensor) for name, tensor in self.tensors().items()}
        if self.common and (own := self._first()) is not None:
            for name in self.common:
                shared = tensors[name]
                tensors[name] = shared.to(own.device, own.dtype if shared.is_floating_point() else None)
        if dtype is not None:
            tensors = {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
        return Tensors(tensors, self.matrix)

    def named_weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters, without the constants among them."""
        return ((name, parameter) for name, parameter in self.named_parameters() if name not in self.constants)

    @property
    def layer(self) -> nn.Module:
        """The layer, while the branch is beside it."""
        return self.parent.base  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device | None:
        """The device of its own tensors."""
        return None if (tensor := self._first()) is None else tensor.device

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype of its own tensors."""
        return None if (tensor := self._first()) is None else tensor.dtype

    def _first(self) -> Tensor | None:
        """A tensor of its own that has a dtype to compute in."""
        for module in (*self._modules.values(), self):
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None and tensor.is_floating_point() and name not in self.common:
                    return tensor
        return None

    def cast(self, x: Tensor) -> Tensor:
        """An input in the dtype of the tensors, unless autocast sees to that."""
        dtype = self.dtype
        if dtype is None or x.dtype == dtype or not x.is_floating_point():
            return x
        return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)

    def _label(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.method.settings().items())
        own = ", ".join(f"{key} {'×'.join(map(str, p.shape))}" for key, p in self._parameters.items() if p is not None)
        return f"({self.method.key.upper()}) {self.switch.name}({settings}){f': {own}' if own else ''}"


Active = list[tuple[Branch, float]]
"""Active branches in the order of their injection, each with its strength."""


@dataclass(frozen=True)
class Method(ABC):
    """The hyperparameters of an adapter and its formula. Subclasses are frozen dataclasses in `adapters.methods`.

    A subclass states `tensors` and `update`; or it extends one of the classes of `adapters.methods.core.formulas`,
    which say the same of the output or the input of a layer, where that is the shorter or the faster way.

    Attributes:
        key: The name of the method in files.
        paper: Where it comes from.
        formula: What becomes of the weight `W`, in a line.
        kinds: The kinds of `Matrix` that it can adapt.
        adapts: What it adapts in words, where that is not a kind of layer.
        fast: The tensors that may learn faster than the others.
        additive: Whether it adds to the weight what does not depend on it. Then patches can be combined.
        mergeable: Whether it can be stated as a change of weights.
        tied_in_files: Whether a layer of a file stands for those too that use the same weight in the same way, which
            have no entry of their own.
        files_have_buffers: Whether files hold the buffers of a layer beside the tensors, as copies of layers do.
        stored_as: The key of the method that it is in files, where that is another.
        rooted: Whether a model has one, where the method goes by default: files name no layer of it.
    """

    key: ClassVar[str]
    paper: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    adapts: ClassVar[tuple[str, ...]] = ()
    plus_lr: ClassVar[frozenset[str]] = frozenset()
    additive: ClassVar[bool] = False
    mergeable: ClassVar[bool] = True
    tied_in_files: ClassVar[bool] = False
    files_have_buffers: ClassVar[bool] = False
    stored_as: ClassVar[str] = ""
    whole_model: ClassVar[bool] = False

    # What it adapts

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        """How it sees that weight of that layer, or None where it cannot adapt it."""
        matrix = Matrix.of(layer, parameter)
        return matrix if matrix is not None and matrix.kind in self.kinds else None

    def chooses(self, parameter: str) -> bool:
        """Whether this is a parameter to adapt in a layer that was chosen, rather than only if it is named itself."""
        return parameter == "weight"

    def includes_descendants(self) -> bool:
        """Whether to choose a module is to choose everything below it."""
        return False

    def default(self, model: nn.Module) -> Callable[[str, nn.Module], bool] | None:
        """What to adapt when no targets are named; None for every layer but the output head."""
        return None

    def check_site(self, site: WeightSpec) -> None:  # noqa: B027 - most refuse nothing
        """Raise a TargetError where the hyperparameters do not fit a weight."""

    def check_training(self, layer: nn.Module, parameter: str) -> None:  # noqa: B027 - most refuse nothing
        """Raise a TargetError where these hyperparameters cannot be kept in training."""

    def check_tensors(self, site: WeightSpec, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027 - most refuse nothing
        """Raise a TargetError where tensors of a file have values that cannot be, such as the number of no row."""

    # Its tensors

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        """The tensors to train, by name, with values that change nothing yet."""
        raise NotImplementedError

    def constants(self, site: WeightSpec) -> dict[str, Tensor]:
        """Tensors that are never trained."""
        return {}

    def shared(self, sites: Sequence[WeightSpec]) -> dict[str, Tensor]:
        """Tensors that all branches have in common: parameters, if they are to be trained.

        Args:
            sites: Every weight that has this method, with these hyperparameters, in one patch.
        """
        return {}

    def shared_shapes(self, sites: Sequence[WeightSpec]) -> dict[str, tuple[int, ...]]:
        """The shapes of what `shared` makes, for those who have the values already."""
        return {}

    def share(self, sites: Sequence[WeightSpec]) -> dict[str, Tensor]:
        """What `shared` makes, as parameters for `build`: one object for all branches.

        They are parameters even where they are never trained. A buffer would be another tensor in each branch after
        the model has moved or changed its dtype.
        """
        return {
            name: tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
            for name, tensor in self.shared(sites).items()
        }

    def build(self, site: WeightSpec, shared: dict[str, Tensor]) -> Branch:
        """A branch for one weight.

        Args:
            site: The weight.
            shared: What `share` made for all weights.

        Raises:
            TargetError: The hyperparameters do not fit this weight.
        """
        branch = Branch()
        for name, tensor in self.tensors(site).items():
            branch.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in self.constants(site).items():
            branch.register_buffer(name, tensor)
        for name, tensor in shared.items():
            branch.register_parameter(name, cast(nn.Parameter, tensor))
        branch.common = frozenset(shared)
        branch.constants = frozenset(name for name, tensor in shared.items() if not tensor.requires_grad)
        return branch

    def starts(self, sites: Sequence[WeightSpec], like: Mapping[str, Tensor]) -> Iterable[Sequence[Tensor]] | None:
        """The first values of the parameters of many branches, made together; None where `build` makes them.

        Args:
            sites: Weights of one kind.
            like: The parameters of a branch for another weight of that kind.
        """
        return None

    def names(self, site: WeightSpec) -> tuple[str, ...]:
        """The parameters of the layer that it changes, the weight first, then the bias if it changes that."""
        return (site.parameter,) if self.mergeable else ()

    # Its formula

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        """What becomes of the weight.

        Args:
            weight: The matrix, `(outputs, inputs)`, with the experts in front for a stack.
            t: The tensors, in the same dtype.

        Returns:
            A new tensor: a merged layer keeps it.
        """
        raise NotImplementedError

    def update_bias(self, bias: Tensor | None, weight: Tensor, t: Tensors) -> Tensor | None:
        """What becomes of the bias, of shape `(outputs,)`, or of there being none."""
        return bias

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        """What becomes of the weight at a strength: on the line from the weight, at 0, to its update, at 1."""
        return lerp(weight, self.update(weight, t), scale)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        """Whether `run` is the way to compute it, for a layer whose output is linear in its weight."""
        return not self.mergeable

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, *args: Any, **kwargs: Any) -> Any:
        """The output of a layer together with the branch, computed beside the layer rather than in its weight."""
        raise NotImplementedError

    def thin(self, branch: Branch) -> Thin | None:
        """The layers that the branch is made of, where it adds two thin matrices to the weight of a linear layer.

        None for anything else, and for a branch that was changed by hand.
        """
        return None

    # Files and pictures

    def settings(self) -> dict[str, Any]:
        """The hyperparameters that are worth showing: neither nothing nor a choice that is the usual one."""
        usual = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if value and not (value == usual[name] and isinstance(value, str))
        }

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    def hyperparameters(self) -> dict[str, Any]:
        """What a file needs to say besides the tensors."""
        return asdict(self)

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors of a branch under the names and in the shapes that files give them, sharing their memory."""
        return {name: tensor for name, tensor in branch.tensors().items() if name not in branch.common}

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        """What a file says of a branch: the method to load it with, and the tensors."""
        return self, self.file_tensors(branch)
