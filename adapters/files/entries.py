"""The layers of a resolved adapter, checked against the weight specs of their targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

import weights
from adapters.errors import AdapterError, TargetError
from adapters.files.resolve.resolved import ResolvedLayer
from adapters.layers.dtypes import is_narrow
from adapters.layers.kinds import buffers
from adapters.layers.matrix import Matrix
from adapters.methods import METHODS
from adapters.methods.core.building import build
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.targets.spec import weight_spec
from adapters.targets.target import Target


@dataclass(slots=True)
class Entry:
    """A target and the tensors that a file has for it. Entries of equal methods have one object for it.

    Attributes:
        target: The weight.
        tensors: The tensors of the file.
        method: The method.
        spec: The weight spec of the target.
        kind: Equal for entries of which one fits its weight if the other does, unless a method goes by something else.
    """

    target: Target
    tensors: Mapping[str, Tensor]
    method: Method
    spec: WeightSpec
    kind: object = field(init=False)

    def __post_init__(self) -> None:
        tensors = [(name, tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()]
        target = self.target
        self.kind = id(self.method), type(target.module), target.parameter, id(self.spec.matrix), *tensors

    @property
    def use(self) -> object:
        """Equal for entries that can share a branch."""
        return id(self.method), self.target.tie_key(self.method)

    @property
    def form(self) -> object:
        """Equal for entries whose branches differ only in their values, unless there is more to them than those."""
        return self.kind, self.spec.kind


def entries_of(layers: Iterable[ResolvedLayer[Target]], trainable: bool) -> tuple[list[Entry], dict[str, list[str]]]:
    """The entries of the layers that fit their targets, and the mismatches of the others by path.

    Args:
        layers: Layers of a resolved adapter.
        trainable: Whether the branches are to be trained.
    """
    problems: dict[str, list[str]] = {}
    entries: list[Entry] = []
    fitting: set[object] = set()
    methods: dict[str, tuple[Mapping[str, object], Method]] = {}
    equal: dict[Method, Method] = {}  # One object for each, which is quicker to compare.
    for target, content, _ in layers:
        content = _of_input(target, content)
        try:
            numbers, method = methods.get(content.method, (None, None))
            if method is None or numbers != content.hyperparameters:
                method = method_of(content)
                method = equal.setdefault(method, method)
                methods[content.method] = content.hyperparameters, method
            entry = _entry(target, content, method, trainable)
            different = [] if entry.kind in fitting else _mismatches(entry)
            if not different:
                fitting.add(entry.kind)
                method.check_tensors(entry.spec, entry.tensors)
        except AdapterError as problem:
            different = [str(problem)]
        else:
            entries += [] if different else [entry]
        if different:
            problems[target.path] = different
    return entries, problems


def shared_mismatches(entries: Sequence[Entry], file: weights.AdapterFile, partial: bool) -> list[str]:
    """The mismatches of the tensors that all layers of a method share.

    Args:
        entries: The layers.
        file: The adapter, which has the tensors.
        partial: Whether the model lacks layers of the adapter, on which the shapes of the tensors may depend.
    """
    by_method: dict[Method, list[WeightSpec]] = {}
    for entry in entries:
        by_method.setdefault(entry.method, []).append(entry.spec)
    problems: list[str] = []
    for method, specs in by_method.items():
        shapes = method.shared_shapes(specs)
        given = {name: file.shared[name] for name in shapes if name in file.shared}
        if len(given) < len(shapes) and partial:
            names = ", ".join(shapes.keys() - given.keys())
            problems.append(f"{names} is not in the file, and depends on the layers that are not in the model")
        problems += mismatches_of({name: torch.empty(shapes[name], device="meta") for name in given}, given)
    return problems


# One layer


def method_of(content: weights.LayerWeights) -> Method:
    """The method of a layer in a file.

    Raises:
        TargetError: The method is unknown, or its hyperparameters are of other types.
        AdapterError: A hyperparameter is out of its range.
    """
    if content.method not in METHODS:
        raise TargetError(f"its method {content.method!r} is not known here: register it, or get a newer version")
    kind = METHODS[content.method]
    for name, value in content.hyperparameters.items():
        if type(value) not in _types(kind).get(name, (type(value),)):
            raise TargetError(f"its {name} is {value!r}, which is nothing for {kind.__name__}")
    try:
        return kind(**content.hyperparameters)
    except TypeError as error:
        raise TargetError(f"its hyperparameters are not those of {kind.__name__} ({error})") from None


@cache
def _types(kind: type[Method]) -> Mapping[str, tuple[type, ...]]:
    """The types that each hyperparameter of a method may have, where these are such as files can tell apart."""
    found: dict[str, tuple[type, ...]] = {}
    for name, hint in get_type_hints(kind).items():
        options = get_args(hint) if isinstance(hint, UnionType) else (hint,)
        types = {get_origin(option) or option for option in options}
        if types <= {bool, int, float, str, tuple, NoneType}:
            found[name] = (*types, int) if float in types else (*types,)
    return found


def _entry(target: Target, content: weights.LayerWeights, method: Method, trainable: bool) -> Entry:
    """The entry of a layer; raises an AdapterError where the method does not apply to the target."""
    if method.matrix(target.module, target.parameter) is None:
        raise TargetError(f"a {type(target.module).__name__} cannot have {content.method}")
    spec = weight_spec(target, method, None, None, uninitialized=True)
    method.check_spec(spec)
    if trainable:
        method.check_training(target.module, target.parameter)
    tensors = content.tensors
    if method.files_have_buffers:
        tensors = _without_buffers(target.module, tensors)
    return Entry(target, tensors, method, spec)


def _of_input(target: Target, content: weights.LayerWeights) -> weights.LayerWeights:
    """A rotation of the input of a layer, where a file may have that of its weight: the inverse for a convolution."""
    numbers = dict(content.hyperparameters)
    if numbers.pop("of_weight", False) is not True:
        return content
    matrix = Matrix.of(target.module, target.parameter)
    inverse = matrix is not None and matrix.kind == "convolution"
    tensors = {name: _negative(tensor) if inverse else tensor for name, tensor in content.tensors.items()}
    return replace(content, hyperparameters=numbers, tensors=tensors)


def _negative(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():  # A mismatch, which is reported as such.
        return tensor
    return -(tensor.float() if is_narrow(tensor.dtype) else tensor)


def _mismatches(entry: Entry) -> list[str]:
    """The mismatches of the tensors of an entry.

    They are compared with a branch on the meta device, so that hyperparameters which do not go with the tensors in the
    file never make any memory be used.
    """
    branch = build_entry(entry, replace(entry.spec, device=torch.device("meta")), {})
    own = entry.method.file_tensors(branch)
    held = {id(part) for tensor in own.values() for part in (tensor, tensor._base)}
    unheld = [name for name, tensor in branch.named_weights() if id(tensor) not in held]
    return mismatches_of(own, entry.tensors) + [f"{name} is nothing that a file has" for name in unheld]


def build_entry(entry: Entry, spec: WeightSpec, shared: dict[str, Tensor]) -> Branch:
    try:
        return build(entry.method, spec, shared)
    except (RuntimeError, TypeError, OverflowError) as error:  # Raised by torch for an impossible size.
        raise TargetError(f"{entry.method} cannot be made ({str(error).splitlines()[0]})") from error


# Tensors


def _without_buffers(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the buffers of a layer; raises a TargetError where these differ from those of the layer."""
    own = buffers(module)
    for name, buffer in own.items():
        given = tensors.get(name, buffer)
        if given.shape != buffer.shape or not torch.equal(given.to(buffer), buffer):
            raise TargetError(f"{name} is not that of the model, and a patch changes parameters, no buffers")
    return {name: tensor for name, tensor in tensors.items() if name not in own}


def mismatches_of(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """The mismatches of two sets of tensors. Formats differ in how many sizes of 1 end a shape."""
    return [
        f"{key} is {_shape(given.get(key))} in the file, {_shape(own.get(key))} in the model"
        for key in {**own, **given}
        if key not in own or key not in given or _kind(own[key]) != _kind(given[key])
    ]


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """Equal for tensors that can be copied into each other: the shape without the sizes of 1 at its end."""
    shape = tensor.shape
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape, tensor.is_complex(), tensor.is_floating_point()


def _shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    dtype = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{dtype}"
