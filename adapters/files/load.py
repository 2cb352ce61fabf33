"""`load`, a patch from an adapter file."""

from __future__ import annotations

import re
from dataclasses import replace
from os import PathLike

from torch import nn

import weights
from adapters.errors import LayerMismatchError, TargetError, refuse
from adapters.files.entries import entries_of, method_of, shared_mismatches
from adapters.files.resolve.path_index import model_index
from adapters.files.resolve.resolved import ResolvedAdapter, ResolvedLayer, resolve
from adapters.files.restore import restore
from adapters.layers.sharded import check_before
from adapters.patch.attachment import Attachment
from adapters.patch.patch import Patch
from adapters.patch.registry import check_name
from adapters.patch.transaction import without_collections
from adapters.targets.models import Model, as_module
from adapters.targets.selection import select
from adapters.targets.target import Target, fingerprint


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
    """Inject an adapter from a file into a model. The format of the file is recognised.

    Args:
        model: The base model, or several together: a pipeline of diffusers, or a dict of modules by the names of
            components.
        source: A folder, a file, or a place on the Hub (`"user/repo"`, `"user/repo@revision"`,
            `"user/repo:folder/file"`); or a file that `weights.read_adapter` has read.
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

    Example:
        >>> patch = adapters.load(model, "someone/style-lora")
        >>> patch.scale = 0.7
        >>> patch.eject()
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
    """Make the patch that `load` injects, without injecting it."""
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
    index = model_index(model)
    resolved = resolve(index, file)
    layers = [*resolved.layers, *_for_whole_model(model, resolved)]
    problems = [*(resolved.mismatches if strict or not layers else resolved.problems)]
    entries, different = entries_of(layers, trainable)
    problems += [f"{path}: {problem}" for path, some in different.items() for problem in some]
    problems += shared_mismatches(entries, file, partial=bool(resolved.missing))
    if problems:
        refuse(_other_model(source, model, file), problems)
    check_before((entry.target for entry in entries), trainable)
    branches = restore(entries, file, trainable, index.weights)
    patch = Patch(name, model, [Attachment.of(*pair) for pair in branches], scale, freezes=trainable)
    patch.skipped = (*sorted(resolved.missing), *file.others)
    return patch


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


def _other_model(source: str | PathLike[str], model: nn.Module, file: weights.AdapterFile) -> str:
    """The first words of the error for a file that does not fit a model."""
    if file.base_structure == fingerprint(model):
        return f"{source} does not fit, though it was made for a model with the same layers"
    words = f"{source} is for another model"
    if len(file.components) > 1:
        words += f", or for several: choose one with component=, out of {', '.join(file.components)}"
    return words


def _for_whole_model(model: nn.Module, resolved: ResolvedAdapter[Target]) -> list[ResolvedLayer[Target]]:
    """The layer of an adapter that is for the whole model, at the default target of its method."""
    content = resolved.whole_model
    if content is None:
        return []
    try:
        chosen = select(model, {None: method_of(content)}, None)
    except TargetError as error:
        raise LayerMismatchError(str(error)) from None
    return [ResolvedLayer(target, content, "") for (target, *_), _ in chosen]
