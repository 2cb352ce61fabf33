"""`Method`, the hyperparameters and the formula, and `Branch`, its tensors at one weight."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

import fluxion as fl
from adapters.activation.switch import Switch
from adapters.layers.matrix import Matrix
from adapters.layers.sharded import gather
from adapters.lowrank.low_rank import LowRank
from adapters.methods.core.arithmetic import Scale, lerp
from adapters.methods.core.declaration import Declared
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


class Branch(fl.Chain):
    """One patch at one weight of a layer: the tensors, and the method that computes with them.

    Attributes:
        method: The hyperparameters and the formula.
        matrix: The weight as a matrix; `Matrix.whole` where the method changes no weight.
        parameter: The name of the weight in its layer.
        changes: The parameters of the layer that the branch changes, the weight first. Empty for a method that cannot
            be merged.
        bypass: Whether the method computes it beside the layer, if that is linear in its weight.
        common: The names of the tensors that all branches of the method share, in the patch.
        constants: The names of parameters that are never trained.
        switch: The activation state of its patch.
        tied: Whether its tensors are those of another branch, at another use of the same weight.
        tensor_parallel: The forward of the node it is in, if its tensors are split with those of the layer.

    Example:
        >>> branch = adapters.inject(model, adapters.LoRA(rank=4)).attachments[0].branch
        >>> print(branch.method, branch.parameter, branch.matrix.shape)
        >>> assert set(branch.tensors()) == {"lora_A", "lora_B"}
    """

    _tag = ""  # The method's key is in the label.

    method: Method
    matrix: Matrix
    parameter: str
    changes: tuple[str, ...]
    bypass: bool
    common: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()
    switch: Switch
    tied: bool = False
    tensor_parallel: Callable[..., Any] | None = None

    def change(self, weights: Mapping[str, Tensor | None], scale: float) -> dict[str, Tensor | None]:
        """The weights of a layer that computes the output of the present layer and this branch together.

        Args:
            weights: By name, in the precision to compute in, each of its own shape. They are not changed.
            scale: The strength, 1 for the method as its paper states it.
        """
        changed = dict(weights)
        weight = weights[self.parameter]
        if weight is None or not self.changes:
            return changed
        tensors, matrix = self.values(weight.dtype), self.matrix.read(weight)
        changed[self.parameter] = self.matrix.write(self.method.change(matrix, tensors, scale), like=weight)
        for name in self.changes[1:]:
            bias, updated = weights[name], self.method.update_bias(weights[name], matrix, tensors)
            if updated is not None:
                changed[name] = (torch.zeros_like(updated) if bias is None else bias).lerp(updated, scale)
        return changed

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; the weight of a layer in this chain by the name of the layer, if it has nothing else."""
        named = (*self.named_parameters(), *self.named_buffers())
        return {name.removesuffix(".weight"): tensor for name, tensor in named}

    def shared_tensors(self) -> dict[str, Tensor]:
        """The tensors that it has in common with the other branches of its method."""
        return {name: tensor for name, tensor in self._parameters.items() if tensor is not None and name in self.common}

    def values(self, dtype: torch.dtype | None = None) -> Tensors:
        """The tensors as a formula takes them, sharded ones gathered.

        Args:
            dtype: The dtype of floating-point ones; by default they stay as they are, but for those that are shared
                with layers on other devices or in other dtypes.
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
        """The first floating-point tensor of its own."""
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
class Method(Declared):
    """The hyperparameters of an adapter and its formula. Subclasses are frozen dataclasses in `adapters.methods`.

    A subclass states `tensors` and `update`, or extends a class of `adapters.methods.core.formulas`, which asks for a
    shorter or faster statement of the same formula. All else here has a default. Every method and attribute belongs to
    one of four parts: where it applies, its tensors, its formula, its files.

    Example:
        >>> method = adapters.LoRA(rank=4, alpha=8)
        >>> print(method, method.key, method.paper, method.formula)
        >>> assert method == adapters.LoRA(rank=4, alpha=8) and method.hyperparameters()["rank"] == 4
    """

    def __str__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.settings().items())})"

    # Where it applies

    kinds: ClassVar[frozenset[str]] = frozenset({"linear", "convolution"})
    """The kinds of `Matrix` that it can adapt."""
    whole_model: ClassVar[str] = ""
    """The kind of model that has one branch as a whole, at its default target: files name no layer of it."""

    def matrix(self, layer: nn.Module, parameter: str) -> Matrix | None:
        """The weight of that layer as it adapts it, or None where it cannot."""
        matrix = Matrix.of(layer, parameter)
        return matrix if matrix is not None and matrix.kind in self.kinds else None

    def selects(self, parameter: str) -> bool:
        """Whether a parameter is adapted in each selected layer, rather than only if it is named itself."""
        return parameter == "weight"

    def includes_descendants(self) -> bool:
        """Whether to select a module is to select everything below it."""
        return False

    def default_targets(self, model: nn.Module) -> Callable[[str, nn.Module], bool] | None:
        """The targets when none are named; None for every layer but the output head."""
        return None

    def check_spec(self, spec: WeightSpec) -> None:
        """Raise a TargetError where the hyperparameters do not fit a weight."""

    def check_training(self, layer: nn.Module, parameter: str) -> None:
        """Raise a TargetError where these hyperparameters cannot be kept in training."""

    # Its tensors

    plus_lr: ClassVar[frozenset[str]] = frozenset()
    """The tensors that LoRA+ gives a higher learning rate (arXiv:2402.12354)."""

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        """The tensors to train, by name, with values that change nothing yet."""
        raise NotImplementedError

    def constants(self, spec: WeightSpec) -> dict[str, Tensor]:
        """Tensors that are never trained."""
        return {}

    def shared(self, specs: Sequence[WeightSpec]) -> dict[str, Tensor]:
        """Tensors that all branches have in common: parameters, if they are to be trained.

        Args:
            specs: Every weight that has this method, with these hyperparameters, in one patch.
        """
        return {}

    def shared_shapes(self, specs: Sequence[WeightSpec]) -> dict[str, tuple[int, ...]]:
        """The shapes of the `shared` tensors, for a file that has their values."""
        return {}

    def build(self, spec: WeightSpec, shared: dict[str, Tensor]) -> Branch:
        """A branch for one weight, with the `shared` tensors as parameters.

        Raises:
            TargetError: The hyperparameters do not fit this weight.
        """
        branch = Branch()
        for name, tensor in self.tensors(spec).items():
            branch.register_parameter(name, nn.Parameter(tensor))
        for name, tensor in self.constants(spec).items():
            branch.register_buffer(name, tensor)
        for name, tensor in shared.items():
            branch.register_parameter(name, cast(nn.Parameter, tensor))
        branch.common = frozenset(shared)
        branch.constants = frozenset(name for name, tensor in shared.items() if not tensor.requires_grad)
        return branch

    def initial_values(
        self, specs: Sequence[WeightSpec], like: Mapping[str, Tensor]
    ) -> Iterable[Sequence[Tensor]] | None:
        """Initial parameters of many branches, made together; None where `build` makes them.

        Args:
            specs: Weights of one kind.
            like: The parameters of a branch for another weight of that kind.
        """
        return None

    # Its formula

    formula: ClassVar[str] = ""
    """The weight with the branch merged, in terms of the weight `W`, in a line."""
    mergeable: ClassVar[bool] = True
    """Whether the formula is one of the weight. If not, there is only `run`."""
    additive: ClassVar[bool] = False
    """Whether the update does not depend on the weight, as that of an `Additive`, so that patches can be combined."""

    def changes(self, spec: WeightSpec) -> tuple[str, ...]:
        """The parameters of the layer that it changes: the weight, then the bias if it changes that."""
        return (spec.parameter,) if self.mergeable else ()

    def update(self, weight: Tensor, t: Tensors) -> Tensor:
        """The weight at strength 1.

        Args:
            weight: The matrix, `(outputs, inputs)`, with the experts in front for a stack.
            t: The tensors, in the same dtype.

        Returns:
            A new tensor: a merged layer keeps it.
        """
        raise NotImplementedError

    def update_bias(self, bias: Tensor | None, weight: Tensor, t: Tensors) -> Tensor | None:
        """The bias at strength 1, of shape `(outputs,)`; given None, the bias of a layer that has none."""
        return bias

    def change(self, weight: Tensor, t: Tensors, scale: float) -> Tensor:
        """The weight at a strength: on the line from the weight, at 0, to its update, at 1."""
        return lerp(weight, self.update(weight, t), scale)

    def bypass(self, layer: nn.Module, matrix: Matrix) -> bool:
        """Whether `run` computes it beside the layer, if the output of that is linear in its weight."""
        return not self.mergeable

    def run(self, branch: Branch, layer: Callable[..., Any], scale: Scale, *args: Any, **kwargs: Any) -> Any:
        """The output of a layer together with the branch, computed beside the layer rather than in its weight."""
        raise NotImplementedError

    def low_rank(self, branch: Branch) -> LowRank | None:
        """The update of a branch at strength 1 where its layers compute a product of two factors, and nothing else.

        The factors are the parameters of the branch. None for anything else, and for a branch that was changed by hand.
        """
        return None

    # Its files

    key: ClassVar[str]
    """The name of the method in files, and in `adapters.METHODS`."""
    paper: ClassVar[str] = ""
    """The source: an arXiv number, an address, or a library."""
    stored_as: ClassVar[str] = ""
    """The key of the method that files hold instead, where that is another."""
    tied_in_files: ClassVar[bool] = False
    """Whether a layer of a file stands for those too that use the same weight, which have no entry of their own."""
    files_have_buffers: ClassVar[bool] = False
    """Whether files hold the buffers of a layer beside the tensors, as copies of layers do."""

    def settings(self) -> dict[str, Any]:
        """The hyperparameters worth showing: those that are true, numbers in full, and names other than the default."""
        usual = {field.name: field.default for field in fields(self)}
        return {
            name: value
            for name, value in asdict(self).items()
            if value and not (value == usual[name] and isinstance(value, str))
        }

    def hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters that files hold."""
        return asdict(self)

    def file_tensors(self, branch: Branch) -> dict[str, Tensor]:
        """The tensors of a branch under the names and in the shapes that files give them, sharing their memory."""
        return {name: tensor for name, tensor in branch.tensors().items() if name not in branch.common}

    def check_tensors(self, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
        """Raise a TargetError where tensors of a file have impossible values, such as an index out of range."""

    def saved(self, branch: Branch) -> tuple[Method, dict[str, Tensor]]:
        """The method that loads a branch from a file, and the tensors."""
        return self, self.file_tensors(branch)
