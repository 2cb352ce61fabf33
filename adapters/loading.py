"""`load`: a patch from a file, placed by the names in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

import weights
from adapters.branch import Branch
from adapters.errors import AdapterError, LayerMismatchError, TargetError
from adapters.layers import buffers
from adapters.matching import find_layers
from adapters.method import Method, Site
from adapters.methods import METHODS
from adapters.patch import Patch, Place, build, check_name, refuse, share, tied_to
from adapters.targets import Layer, layers, select


def load(
    model: nn.Module,
    source: str | PathLike[str],
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
        model: The base model.
        source: A folder, a file, or the id of a repository on the Hub.
        name: The name of the patch, by default the last part of the source.
        scale: How strongly it acts.
        component: The part to load of a file that is for several models, such as `"unet"` or `"text_encoder_2"`. By
            default everything, in a model that has the others by their names, or from a file that is for one.
        revision: Branch, tag or commit, for a repository on the Hub.
        strict: Raise when the file has layers that the model does not have. Otherwise they are left out.
        trainable: Leave the tensors trainable and freeze the base.

    Raises:
        LayerMismatchError: The file does not fit the model: the message lists where.
        PatchNameError: The name is in use.
        weights.WeightsError: The source cannot be read.
    """
    name = name or Path(source).name.removesuffix(".safetensors") or "default"
    check_name(model, name)
    file = weights.read_adapter(source, revision=revision)
    if component is not None:
        whole, file = file, file.part(component)
        if not file.layers:
            parts = ", ".join(whole.components) or "none"
            raise LayerMismatchError(f"{source} has no part {component!r}: its parts are {parts}.")
    everything = layers(model)
    found, missing, problems = find_layers(everything, file)
    rooted = _rooted(model, file)
    found += rooted
    missing = [path for path in missing if path or not rooted]
    problems += [f"there is no layer {path}" for path in sorted(missing) if strict or not found]
    entries, unfit = _entries(found, file, trainable)
    places, unfilled = _restored(entries, everything, file, partial=len(found) < len(file.layers))
    mismatch = f"{source} is for another model"
    if file.flattened and len(file.components) > 1:
        mismatch += f", or for several: choose one with component=, out of {', '.join(file.components)}"
    refuse(mismatch, problems + unfit + unfilled)
    for place in places:
        for _, parameter in place.branch.named_weights():
            parameter.requires_grad_(trainable)
    return Patch(name, model, places, scale, freezes=trainable).inject()


def _rooted(model: nn.Module, file: weights.AdapterFile) -> list[tuple[Layer, str]]:
    """Where the adapter belongs that a file has for the whole model, if it has one."""
    if "" not in file.layers:
        return []
    try:
        chosen = select(model, {None: _method(file.layers[""])}, None)
    except TargetError as error:
        raise LayerMismatchError(str(error)) from None
    return [(layer, "") for (layer, *_), _ in chosen]


@dataclass(frozen=True)
class _Entry:
    """A layer of a file and where it belongs."""

    layer: Layer
    tensors: Mapping[str, Tensor]
    method: Method
    site: Site

    @property
    def use(self) -> object:
        """Equal for entries that can share a branch."""
        return self.method, self.layer.use(self.method)


def _entries(
    found: Sequence[tuple[Layer, str]], file: weights.AdapterFile, trainable: bool
) -> tuple[list[_Entry], list[str]]:
    """What a file has for the layers that were found, and what is wrong with the others."""
    problems: list[str] = []
    entries: list[_Entry] = []
    for layer, path in found:
        content = file.layers[path]
        try:
            method = _method(content)
            if method.matrix(layer.module, layer.parameter) is None:
                raise TargetError(f"a {type(layer.module).__name__} cannot have {content.method}")
            site = Site.of(layer, method, None, None, own=True)
            method.check_site(site)
            if trainable:
                method.check_training(layer.module, layer.parameter)
        except AdapterError as problem:
            problems.append(f"{layer.path}: {problem}")
        else:
            entries.append(_Entry(layer, content.tensors, method, site))
    return entries, problems


def _method(content: weights.LayerWeights) -> Method:
    """The method of a layer in a file; raises a TargetError where it is not known, an AdapterError for its numbers."""
    if content.method not in METHODS:
        raise TargetError(f"its method {content.method!r} is not known here: register it, or get a newer version")
    kind = METHODS[content.method]
    try:
        return kind(**content.hyperparameters)
    except TypeError as error:
        raise TargetError(f"its hyperparameters are not those of {kind.__name__} ({error})") from None


def _restored(
    entries: Sequence[_Entry], everything: Sequence[Layer], file: weights.AdapterFile, partial: bool
) -> tuple[list[Place], list[str]]:
    """Branches as a file has them, in their places, and what does not fit."""
    shared = share((entry.method, entry.site) for entry in entries)
    problems: list[str] = []
    for common in shared.values():
        given = {name: file.shared[name] for name in common if name in file.shared}
        if len(given) < len(common) and partial:
            names = ", ".join(common.keys() - given.keys())
            problems.append(f"{names} is not in the file, and depends on the layers that are not in the model")
        problems += _fill({name: common[name] for name in given}, given)
    places: list[Place] = []
    uses: dict[object, tuple[Branch, Mapping[str, Tensor]]] = {}
    for entry in entries:
        first, same = uses.get(entry.use, (None, entry.tensors))
        if first is not None and _equal(entry.tensors, same):  # They were tied when the file was made.
            places.append(Place.of(entry.layer, tied_to(first)))
            continue
        branch = build(entry.method, entry.site, shared[entry.method])
        uses[entry.use] = branch, entry.tensors
        tensors, different = _without_buffers(entry) if entry.method.files_have_buffers else (entry.tensors, [])
        different += _fill(entry.method.file_tensors(branch), tensors)
        problems += [f"{entry.layer.path}: {problem}" for problem in different]
        places.append(Place.of(entry.layer, branch))
        if entry.method.tied_in_files:
            others = [other for other in everything if not file.layers.keys() & {*other.paths}]
            tied = [other for other in others if (entry.method, other.use(entry.method)) == entry.use]
            places += [Place.of(other, tied_to(branch)) for other in tied]
    return places, problems


def _equal(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        tensor.shape == other[name].shape and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def _without_buffers(entry: _Entry) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors without the buffers of their layer, and those of the buffers that are not what the layer has."""
    given, own = entry.tensors, buffers(entry.layer.module)
    different = [
        f"{name} is not that of the model, and a patch changes parameters, no buffers"
        for name, buffer in own.items()
        if name in given and not torch.equal(given[name].to(buffer), buffer)
    ]
    return {name: tensor for name, tensor in given.items() if name not in own}, different


def _fill(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> list[str]:
    """Copy tensors into others, or say what does not fit. Formats differ in how many sizes of 1 end a shape."""
    problems = [
        f"{key} is {_shape(given.get(key))} in the file, {_shape(own.get(key))} in the model"
        for key in {**own, **given}
        if key not in own or key not in given or _significant(own[key]) != _significant(given[key])
    ]
    if not problems:
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(given[key].view(tensor.shape))
    return problems


def _significant(tensor: Tensor) -> tuple[int, ...]:
    """The shape without the sizes of 1 at its end."""
    last = max((place for place, size in enumerate(tensor.shape) if size != 1), default=-1)
    return tuple(tensor.shape[: last + 1])


def _shape(tensor: Tensor | None) -> str:
    return "missing" if tensor is None else str(tuple(tensor.shape))
