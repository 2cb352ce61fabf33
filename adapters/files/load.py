"""`load`: a patch from a file, placed by the names in it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from os import PathLike
from types import NoneType, UnionType
from typing import get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn

import weights
from adapters.errors import AdapterError, LayerMismatchError, TargetError, refuse
from adapters.files.resolve.matching import find_layers, places_of
from adapters.files.resolve.original_names import with_names_of
from adapters.files.resolve.rotary import in_halves
from adapters.layers.dtypes import is_narrow
from adapters.layers.kinds import buffers
from adapters.layers.matrix import Matrix
from adapters.layers.sharded import check_before
from adapters.methods import METHODS
from adapters.methods.core.building import Mould, build, share, tied_to
from adapters.methods.core.method import Branch, Method
from adapters.methods.core.spec import WeightSpec
from adapters.patch.attachment import Attachment
from adapters.patch.patch import Patch
from adapters.patch.registry import check_name
from adapters.patch.transaction import without_collections
from adapters.targets.models import Model, as_module
from adapters.targets.selection import select
from adapters.targets.spec import weight_spec
from adapters.targets.target import Target, all_targets, structure


def load(
    model: Model,
    source: str | PathLike[str] | weights.AdapterFile,
    *,
    name: str | None = None,
    scale: float = 1.0,
    component: str | None = None,
    revision: str | None = None,
    strict: bool = True,
    trainable: bool = False,
) -> Patch:
    """Put an adapter from a file into a model. The format of the file is recognised.

    Args:
        model: The base model, or several together: a pipeline of diffusers, or a table of modules by the names of
            components.
        source: A folder, a file, or a place on the Hub (`"user/repo"`, `"user/repo@revision"`,
            `"user/repo:folder/file"`); or what `weights.read_adapter` has read.
        name: The name of the patch, by default the last part of the source.
        scale: How strongly it acts.
        component: The part to load of a file that is for several models, such as `"unet"` or `"text_encoder_2"`. By
            default everything, in a model that has the others by their names, or from a file that is for one.
        revision: Branch, tag or commit, for a repository on the Hub.
        strict: Raise when the file has layers that the model does not have, or tensors for no layer, such as the
            embeddings of new tokens. Otherwise they are left out, and named in `Patch.skipped`.
        trainable: Leave the tensors trainable and freeze the base.

    Raises:
        LayerMismatchError: The file does not fit the model: the message lists where.
        PatchNameError: The name is in use.
        weights.WeightsError: The source cannot be read.
    """
    patch = read(
        model, source, name, scale=scale, component=component, revision=revision, strict=strict, trainable=trainable
    )
    with without_collections():
        return patch.inject()


@without_collections()
def read(
    model: Model,
    source: str | PathLike[str] | weights.AdapterFile,
    name: str | None = None,
    *,
    scale: float = 1.0,
    component: str | None = None,
    revision: str | None = None,
    strict: bool = True,
    trainable: bool = False,
) -> Patch:
    """The patch that `load` puts into a model, which is not there yet."""
    model = as_module(model)
    if isinstance(source, weights.AdapterFile):
        file, name, source = _copied(source), name or "default", "The adapter"
        check_name(model, name)
    else:
        name = name or last_part(source)
        check_name(model, name)
        file = weights.read_adapter(source, revision=revision)
    if component is not None:
        whole, file = file, file.part(component)
        if not file.layers:
            parts = ", ".join(whole.components) or "none"
            raise LayerMismatchError(f"{source} has nothing for {component!r}: its components are {parts}.")
    if strict and file.others:
        raise LayerMismatchError(
            f"{source} has {', '.join(file.others)} too, which is for no layer: an embedding of a new token has to be"
            " put into the text encoder by hand; load the rest with strict=False."
        )
    file = in_halves(model, file)
    everything = all_targets(model)
    places = places_of(everything, file)
    file, unnamed = with_names_of(places, file)
    found, missing, problems = find_layers(everything, places, file)
    rooted = _rooted(model, file)
    found += rooted
    missing = [path for path in missing if path or not rooted]
    problems += unnamed + [f"there is no layer {path}" for path in sorted(missing) if strict or not found]
    entries, different = _entries(found, file, trainable)
    unfit = [f"{path}: {problem}" for path, some in different.items() for problem in some]
    unfit += _shared_misfits(entries, file, partial=len(found) < len(file.layers))
    if problems := problems + unfit:
        refuse(_mismatch(source, model, file), problems)
    check_before((entry.layer for entry in entries), trainable)
    patch = Patch(name, model, _restored(entries, everything, file, trainable), scale, freezes=trainable)
    patch.skipped = (*sorted(missing), *file.others)
    return patch


def misfits(model: Model, file: weights.AdapterFile) -> dict[str, list[str]]:
    """What is wrong with layers of a file that a model has by the same names, by their paths."""
    everything = all_targets(as_module(model))
    found, _, _ = find_layers(everything, places_of(everything, file), file)
    return _entries(found, file, trainable=False)[1]


def _copied(file: weights.AdapterFile) -> weights.AdapterFile:
    """A file with tensors of its own, as a patch may take those it is given."""
    layers = {
        path: replace(layer, tensors={name: tensor.clone() for name, tensor in layer.tensors.items()})
        for path, layer in file.layers.items()
    }
    return replace(file, layers=layers)


def last_part(source: str | PathLike[str]) -> str:
    """The name of a file, a folder or a repository."""
    last = re.split(r"[/\\:]", str(source).rstrip("/\\"))[-1]
    return last.removesuffix(".safetensors").partition("@")[0].strip(".") or "default"


def _mismatch(source: str | PathLike[str], model: nn.Module, file: weights.AdapterFile) -> str:
    """What to say first of a file that does not fit a model."""
    if file.base_structure == structure(model):
        return f"{source} does not fit, though it was made for a model with the same layers"
    what = f"{source} is for another model"
    if len(file.components) > 1:
        what += f", or for several: choose one with component=, out of {', '.join(file.components)}"
    return what


def _rooted(model: nn.Module, file: weights.AdapterFile) -> list[tuple[Target, str]]:
    """Where the adapter belongs that a file has for the whole model, if it has one."""
    if "" not in file.layers:
        return []
    try:
        chosen = select(model, {None: _method(file.layers[""])}, None)
    except TargetError as error:
        raise LayerMismatchError(str(error)) from None
    return [(layer, "") for (layer, *_), _ in chosen]


@dataclass(slots=True)
class _Entry:
    """A layer of a file and where it belongs. Of methods that are equal, all entries have the same one.

    Attributes:
        kind: Equal for entries of which one fits its layer if the other does, unless a method goes by something else.
    """

    layer: Target
    tensors: Mapping[str, Tensor]
    method: Method
    site: WeightSpec
    kind: object = field(init=False)

    def __post_init__(self) -> None:
        tensors = [(name, tensor.shape, tensor.dtype) for name, tensor in self.tensors.items()]
        layer = self.layer
        self.kind = id(self.method), type(layer.module), layer.parameter, id(self.site.matrix), *tensors

    @property
    def use(self) -> object:
        """Equal for entries that can share a branch."""
        return id(self.method), self.layer.use(self.method)

    @property
    def structure(self) -> object:
        """Equal for entries whose branches differ only in their values, unless there is more to them than those."""
        return self.kind, self.site.kind


def _entries(
    found: Sequence[tuple[Target, str]], file: weights.AdapterFile, trainable: bool
) -> tuple[list[_Entry], dict[str, list[str]]]:
    """What a file has for the layers that were found, and what is wrong with the others, by their paths."""
    problems: dict[str, list[str]] = {}
    entries: list[_Entry] = []
    fitting: set[object] = set()
    methods: dict[str, tuple[Mapping[str, object], Method]] = {}
    equal: dict[Method, Method] = {}  # One object for each, which is quicker to compare.
    for layer, path in found:
        content = _of_input(layer, file.layers[path])
        try:
            numbers, method = methods.get(content.method, (None, None))
            if method is None or numbers != content.hyperparameters:
                method = _method(content)
                method = equal.setdefault(method, method)
                methods[content.method] = content.hyperparameters, method
            entry = _entry(layer, content, method, trainable)
            different = [] if entry.kind in fitting else _misfits(entry)
            if not different:
                fitting.add(entry.kind)
                method.check_tensors(entry.site, entry.tensors)
        except AdapterError as problem:
            different = [str(problem)]
        else:
            entries += [] if different else [entry]
        if different:
            problems[layer.path] = different
    return entries, problems


def _entry(layer: Target, content: weights.LayerWeights, method: Method, trainable: bool) -> _Entry:
    """What a file has for a layer; raises an AdapterError where the layer cannot have it."""
    if method.matrix(layer.module, layer.parameter) is None:
        raise TargetError(f"a {type(layer.module).__name__} cannot have {content.method}")
    site = weight_spec(layer, method, None, None, own=True)
    method.check_site(site)
    if trainable:
        method.check_training(layer.module, layer.parameter)
    tensors = content.tensors
    if method.files_have_buffers:
        tensors = _without_buffers(layer.module, tensors)
    return _Entry(layer, tensors, method, site)


def _of_input(layer: Target, content: weights.LayerWeights) -> weights.LayerWeights:
    """The same rotation, where a file has that of the weight of a convolution: the other way than that of its input."""
    numbers = dict(content.hyperparameters)
    if numbers.pop("of_weight", False) is not True:
        return content
    matrix = Matrix.of(layer.module, layer.parameter)
    turned = matrix is not None and matrix.kind == "convolution"
    tensors = {name: _negative(tensor) if turned else tensor for name, tensor in content.tensors.items()}
    return replace(content, hyperparameters=numbers, tensors=tensors)


def _negative(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():  # Which is wrong anyway, as will be said.
        return tensor
    return -(tensor.float() if is_narrow(tensor.dtype) else tensor)


def _method(content: weights.LayerWeights) -> Method:
    """The method of a layer in a file; raises a TargetError where it is not known, an AdapterError for its numbers."""
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


def _misfits(entry: _Entry) -> list[str]:
    """What is wrong with the tensors of an entry.

    They are compared with a branch that has shapes only, so that numbers which do not go with the tensors in the file
    never make any memory be used.
    """
    branch = _built(entry, replace(entry.site, device=torch.device("meta")), {})
    own = entry.method.file_tensors(branch)
    held = {id(part) for tensor in own.values() for part in (tensor, tensor._base)}
    unheld = [name for name, tensor in branch.named_weights() if id(tensor) not in held]
    return _different(own, entry.tensors) + [f"{name} is nothing that a file has" for name in unheld]


def _built(entry: _Entry, site: WeightSpec, shared: dict[str, Tensor]) -> Branch:
    try:
        return build(entry.method, site, shared)
    except (RuntimeError, TypeError, OverflowError) as error:  # What torch raises for a size that is none.
        raise TargetError(f"{entry.method} cannot be made ({str(error).splitlines()[0]})") from error


def _shared_misfits(entries: Sequence[_Entry], file: weights.AdapterFile, partial: bool) -> list[str]:
    """What is wrong with the tensors that the layers of each method have in common."""
    by_method: dict[Method, list[WeightSpec]] = {}
    for entry in entries:
        by_method.setdefault(entry.method, []).append(entry.site)
    problems: list[str] = []
    for method, sites in by_method.items():
        shapes = method.shared_shapes(sites)
        given = {name: file.shared[name] for name in shapes if name in file.shared}
        if len(given) < len(shapes) and partial:
            names = ", ".join(shapes.keys() - given.keys())
            problems.append(f"{names} is not in the file, and depends on the layers that are not in the model")
        problems += _different({name: torch.empty(shapes[name], device="meta") for name in given}, given)
    return problems


def _restored(
    entries: Sequence[_Entry], everything: Sequence[Target], file: weights.AdapterFile, trainable: bool
) -> list[Attachment]:
    """Branches as a file has them, in their places."""
    shared = share((entry.method, entry.site) for entry in entries)
    for common in shared.values():
        given = {name: file.shared[name] for name in common if name in file.shared}
        _fill({name: common[name] for name in given}, given)
    places: list[Attachment] = []
    uses: dict[object, tuple[Branch, Mapping[str, Tensor]]] = {}
    moulds: dict[object, _Mould] = {}
    built: list[Branch] = []
    for entry in entries:
        use, structure = entry.use, entry.structure
        first, same = uses.get(use, (None, entry.tensors))
        if first is not None and _equal(entry.tensors, same):  # They were tied when the file was made.
            places.append(Attachment.of(entry.layer, tied_to(first)))
            continue
        mould = moulds.get(structure)
        if mould is not None:
            branch = mould.cast(entry.tensors, trainable)
        else:
            branch = _built(entry, entry.site, shared[entry.method])
            own = entry.method.file_tensors(branch)
            _fill(own, entry.tensors)
            built.append(branch)
            if (mould := _Mould.of(branch, own)) is not None:
                moulds[structure] = mould
        uses[use] = branch, entry.tensors
        places.append(Attachment.of(entry.layer, branch))
        if entry.method.tied_in_files:
            others = [other for other in everything if not file.layers.keys() & {*other.paths}]
            tied = [other for other in others if (id(entry.method), other.use(entry.method)) == use]
            places += [Attachment.of(other, tied_to(branch)) for other in tied]
    for branch in built:
        for _, parameter in branch.named_weights():
            parameter.requires_grad_(trainable)
    return places


class _Mould:
    """A branch to make others of that differ only in their values, and what its parameters are called in a file."""

    def __init__(self, mould: Mould, names: Mapping[int, str]) -> None:
        self._mould = mould
        self._parameters = [(names[id(parameter)], parameter) for parameter in mould.parameters.values()]

    @classmethod
    def of(cls, branch: Branch, own: Mapping[str, Tensor]) -> _Mould | None:
        """That of a branch, unless there is more to it than the parameters that a file has."""
        mould, names = Mould.of(branch), {id(tensor): key for key, tensor in own.items()}
        fits = mould is not None and names.keys() == {id(parameter) for parameter in mould.parameters.values()}
        return cls(mould, names) if mould is not None and fits else None

    def cast(self, tensors: Mapping[str, Tensor], trainable: bool) -> Branch:
        """A branch with the values that a file has, which were found to fit."""
        values = [
            tensor if _is_alike(tensor := tensors[key], like) else tensor.view(like.shape).to(like)
            for key, like in self._parameters
        ]
        return self._mould.cast(values, trainable)


def _is_alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.dtype, one.device) == (other.shape, other.dtype, other.device)


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.shape == other[name].shape and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def _without_buffers(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the buffers of a layer; raises a TargetError where those are not what the layer has."""
    own = buffers(module)
    for name, buffer in own.items():
        given = tensors.get(name, buffer)
        if given.shape != buffer.shape or not torch.equal(given.to(buffer), buffer):
            raise TargetError(f"{name} is not that of the model, and a patch changes parameters, no buffers")
    return {name: tensor for name, tensor in tensors.items() if name not in own}


def _different(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Which tensors do not fit others. Formats differ in how many sizes of 1 end a shape."""
    return [
        f"{key} is {_shape(given.get(key))} in the file, {_shape(own.get(key))} in the model"
        for key in {**own, **given}
        if key not in own or key not in given or _kind(own[key]) != _kind(given[key])
    ]


def _fill(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Copy tensors into others."""
    refuse("The tensors are for other layers", _different(own, given))
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(given[key].view(tensor.shape))


def _kind(tensor: Tensor) -> tuple[object, ...]:
    """What tensors have in common that can be copied into each other: the shape without the sizes of 1 at its end."""
    shape = tensor.shape
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape, tensor.is_complex(), tensor.is_floating_point()


def _shape(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    dtype = "" if tensor.is_floating_point() else f" of {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{dtype}"
