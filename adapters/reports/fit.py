"""The fit of an adapter to a checkpoint, of which only names and shapes are known, and its branches there.

Without a checkpoint, the branches are made for layers of the shapes that the tensors of the adapter have.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import weights
from adapters.errors import AdapterError
from adapters.files.checkpoint import Checkpoint
from adapters.files.entries import entries_of, shared_mismatches
from adapters.files.resolve.resolved import ResolvedLayer, resolve
from adapters.files.restore import restore
from adapters.files.skeleton import Skeleton, alone
from adapters.layers.kinds import CONVOLUTIONS
from adapters.lowrank.low_rank import LowRank
from adapters.lowrank.spectra import Update
from adapters.methods import METHODS
from adapters.methods.core import formulas
from adapters.methods.core.method import Branch
from adapters.reports.facts import Fit
from adapters.targets.target import Target

_ONLY_THE_MODEL = "only the model itself shows whether it loads"
_ABSENT = "the base has no layer of this name"
_NEEDS_BASE = "its update is known only with the base model"


@dataclass(frozen=True)
class Fitted:
    """The branches of an adapter at layers that have shapes and no values.

    Attributes:
        file: The adapter, with the paths of the base where that has the layers.
        branches: The name of the weight in the base, and the branch, by the path of the layer.
        notes: The reason why there is no branch for a layer, by its path.
        fit: The layers that would load, where there is a base.
    """

    file: weights.AdapterFile
    branches: dict[str, tuple[str, Branch]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    fit: Fit | None = None


def fit(file: weights.AdapterFile, checkpoint: Checkpoint) -> Fitted:
    """Fit an adapter to a checkpoint, as far as its layers do."""
    if file.counted:  # It has numbers for layers.
        return replace(fit_alone(file), fit=Fit((), (), tuple(file.layers)))
    try:
        resolved = resolve(checkpoint.index, file)
    except AdapterError as problem:
        return replace(fit_alone(file), fit=Fit((), (str(problem),), ()))
    prompts = [layer.weight.path for layer in resolved.layers if not _changes_weight(layer.content)]
    unchecked = dict.fromkeys(([] if resolved.whole_model is None else [""]) + prompts, _ONLY_THE_MODEL)
    checked = [layer for layer in resolved.layers if layer.weight.path not in unchecked]
    (layers,) = Skeleton(checkpoint.infos).targets_of([replace(resolved, layers=checked)], checkpoint.read)
    branches, wrong = _branches(layers, file)
    refused = [*resolved.mismatches, *(f"{path}: {problem}" for path, problem in wrong.items())]
    refused += [f"{name} is for no layer" for name in file.others]
    contents = {layer.weight.path: layer.content for layer in resolved.layers}
    if resolved.whole_model is not None:
        contents = {"": resolved.whole_model, **contents}
    notes = {**unchecked, **wrong, **dict.fromkeys(resolved.missing, _ABSENT)}
    renamed = replace(file, layers={**contents, **resolved.missing}, components=(), flattened=False)
    return Fitted(renamed, branches, notes, Fit((*branches,), (*refused,), (*unchecked,)))


def fit_alone(file: weights.AdapterFile) -> Fitted:
    """Fit an adapter to layers of the shapes that its tensors have, where these show them."""
    layers: list[ResolvedLayer[Target]] = []
    notes: dict[str, str] = {}
    for path, content in file.layers.items():
        layer = _layer_of(content) if path else None
        if layer is None:
            notes[path] = _NEEDS_BASE
        else:
            layers.append(ResolvedLayer(alone(layer, "weight", path), content, path))
    branches, wrong = _branches(layers, file)
    return Fitted(file, branches, {**notes, **wrong})


def update_of(branch: Branch, weight: Tensor | None) -> Update | None:
    """The update of a weight by a branch at scale 1; None where it depends on a weight which is not given."""
    method, matrix = branch.method, branch.matrix
    if method.is_low_rank:
        return LowRank(*cast(formulas.LowRank, method).factors(branch.values(torch.float64)))
    if method.additive:
        zero = torch.zeros(matrix.shape)
        update = method.change(zero, branch.values(zero.dtype), 1.0)
    elif weight is not None:
        before = matrix.read(weight)
        update = method.change(before, branch.values(before.dtype), 1.0) - before
    else:
        return None
    # A method that takes weights as they are takes those of convolutions too.
    return update.flatten(1) if matrix.kind == "any" and update.ndim > 2 else update


def _branches(
    layers: Sequence[ResolvedLayer[Target]], file: weights.AdapterFile
) -> tuple[dict[str, tuple[str, Branch]], dict[str, str]]:
    """The branches of the layers that fit, each with the name of its weight, and the mismatches of the others."""
    entries, different = entries_of(layers, trainable=False)
    wrong = {path: "; ".join(problems) for path, problems in different.items()}
    if shared := shared_mismatches(entries, file, partial=False):
        return {}, {**wrong, **{entry.target.path: "; ".join(shared) for entry in entries}}
    return {
        target.path: (f"{target.path}.weight" if target.parameter == "weight" else target.path, branch)
        for target, branch in restore(entries, file)
    }, wrong


def _changes_weight(layer: weights.LayerWeights) -> bool:
    """Whether a method is a change of a weight."""
    return layer.method not in METHODS or METHODS[layer.method].mergeable


def _layer_of(layer: weights.LayerWeights) -> nn.Module | None:
    """A layer of the shape of the update, where the tensors show it."""
    method, tensors = METHODS.get(layer.method), layer.tensors
    if method is None or not method.additive:
        return None
    kernel: list[int] = []
    if {"lora_A", "lora_B"} <= tensors.keys():
        (outputs, *_), (_, inputs, *kernel) = tensors["lora_B"].shape, tensors["lora_A"].shape
    elif {"lora_embedding_A", "lora_embedding_B"} <= tensors.keys():
        rows, size = tensors["lora_embedding_A"].shape[-1], tensors["lora_embedding_B"].shape[0]
        return nn.Embedding(rows, size, device="meta")
    elif {"hada_w1_a", "hada_w1_b"} <= tensors.keys() and "hada_t1" not in tensors:
        outputs, inputs = tensors["hada_w1_a"].shape[0], tensors["hada_w1_b"].shape[-1]
    elif (first := _product(tensors, "lokr_w1")) and (second := _product(tensors, "lokr_w2")):
        outputs, inputs, *kernel = first[0] * second[0], first[1] * second[1], *second[2:]
    else:
        return None
    if len(kernel) > len(CONVOLUTIONS):
        return None
    if not kernel:
        return nn.Linear(inputs, outputs, bias=False, device="meta")
    convolution: Any = CONVOLUTIONS[len(kernel) - 1]
    return cast(nn.Module, convolution(inputs, outputs, kernel, bias=False, device="meta"))


def _product(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...]:
    """The shape of a factor, which may be a product itself; `()` where the tensors do not show it."""
    if name in tensors:
        return tuple(tensors[name].shape) if tensors[name].ndim > 1 else ()
    if f"{name}_a" in tensors and f"{name}_b" in tensors and "lokr_t2" not in tensors:
        return tensors[f"{name}_a"].shape[0], tensors[f"{name}_b"].shape[-1]
    return ()
