"""What of an adapter fits a checkpoint, of which only names and shapes are known, and the branches that it makes there.

Without a checkpoint, the branches are made beside layers of the shapes that the tensors of the adapter have.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

import weights
from adapters.errors import AdapterError
from adapters.files.checkpoint import Checkpoint
from adapters.files.load import misfits, read
from adapters.files.resolve.placing import place, standins
from adapters.layers.kinds import CONVOLUTIONS
from adapters.lowrank.spectra import Update
from adapters.methods import METHODS
from adapters.methods.core.formulas import LowRank
from adapters.methods.core.method import Branch
from adapters.reports.facts import Fit

_ONLY_THE_MODEL = "only the model itself shows whether it loads"
_ABSENT = "the base has no layer of this name"
_NEEDS_BASE = "its update is known only with the base model"


@dataclass(frozen=True)
class Fitted:
    """An adapter beside layers that have shapes and no values.

    Attributes:
        file: The adapter, with the paths of the base where that has the layers.
        branches: What there is for a weight and the name of that in the base, by the path of the layer.
        notes: Why there is no branch for a layer, by its path.
        fit: What would load, where there is a base.
    """

    file: weights.AdapterFile
    branches: dict[str, tuple[str, Branch]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    fit: Fit | None = None


def fit(file: weights.AdapterFile, checkpoint: Checkpoint, settings: Mapping[str, Mapping[str, Any]]) -> Fitted:
    """Put an adapter beside the layers of a checkpoint as far as they fit, and say what does not."""
    if file.counted:  # It has numbers for layers.
        alone = beside_own_shapes(file)
        return replace(alone, fit=Fit((), (), tuple(file.layers)))
    try:
        file, absent, refused = place(checkpoint, settings, file)
    except AdapterError as problem:
        alone = beside_own_shapes(file)
        return replace(alone, fit=Fit((), (str(problem),), ()))
    unchecked = {path: _ONLY_THE_MODEL for path, layer in file.layers.items() if not path or _is_beside(layer)}
    checked = {path: layer for path, layer in file.layers.items() if path not in unchecked}
    model = standins(checkpoint.slots, [replace(file, layers=checked)], checkpoint.read)
    branches, wrong = _branches(model, replace(file, layers=checked))
    refused += [f"{path}: {problem}" for path, problem in wrong.items()]
    refused += [f"{name} is for no layer" for name in file.others]
    notes = {**unchecked, **wrong, **dict.fromkeys(absent, _ABSENT)}
    file = replace(file, layers={**file.layers, **absent})
    return Fitted(file, branches, notes, Fit((*branches,), (*refused,), (*unchecked,)))


def beside_own_shapes(file: weights.AdapterFile) -> Fitted:
    """Put an adapter beside layers of the shapes that its tensors have, where these show them."""
    model = nn.Module()
    for path, layer in file.layers.items():
        if path and (standin := _standin(layer)) is not None:
            model._modules[path] = standin
    notes = {path: _NEEDS_BASE for path in file.layers if path not in model._modules}
    layers = {path: layer for path, layer in file.layers.items() if path not in notes}
    plain = replace(
        file, layers=layers, flattened=False, components=(), counted={}, aliases={}, interleaved=frozenset()
    )
    branches, wrong = _branches(model, plain)
    return Fitted(file, branches, {**notes, **wrong})


def update_of(branch: Branch, weight: Tensor | None) -> Update | None:
    """What a branch adds to a weight at scale 1; None where that depends on a weight which is not given."""
    method, matrix = branch.method, branch.matrix
    if isinstance(method, LowRank) and type(method).change is LowRank.change:
        return Update(*method.factors(branch.values(torch.float64)))
    if method.additive:
        zero = torch.zeros(matrix.shape)
        update = method.change(zero, branch.values(zero.dtype), 1.0)
    elif weight is not None:
        before = matrix.read(weight)
        update = method.change(before, branch.values(before.dtype), 1.0) - before
    else:
        return None
    # A method that takes weights as they are takes those of convolutions too.
    return Update(update.flatten(1) if matrix.kind == "any" and update.ndim > 2 else update)


def _branches(model: nn.Module, file: weights.AdapterFile) -> tuple[dict[str, tuple[str, Branch]], dict[str, str]]:
    """The branches of those layers that fit a model, and what is wrong with the others, by their paths."""
    wrong = {path: "; ".join(problems) for path, problems in misfits(model, file).items()}
    layers = {path: layer for path, layer in file.layers.items() if path not in wrong}
    if not layers:
        return {}, wrong
    try:
        patch = read(model, replace(file, layers=layers, others={}), "fitted")
    except AdapterError as problem:  # With what layers have in common.
        return {}, {**wrong, **dict.fromkeys(layers, str(problem))}
    names = {id(module): name for name, module in model.named_children()}
    return {
        place.path: (f"{names[id(place.target)]}.{place.branch.parameter}", place.branch)
        for place in patch.places
        if place.path in layers
    }, wrong


def _is_beside(layer: weights.LayerWeights) -> bool:
    """Whether a method is no change of a weight."""
    return layer.method in METHODS and not METHODS[layer.method].mergeable


def _standin(layer: weights.LayerWeights) -> nn.Module | None:
    """A layer of the shape that the update of its weight has, where that depends on nothing else."""
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
    """The shape of a factor, which may be a product itself; nothing for what is none."""
    if name in tensors:
        return tuple(tensors[name].shape) if tensors[name].ndim > 1 else ()
    if f"{name}_a" in tensors and f"{name}_b" in tensors and "lokr_t2" not in tensors:
        return tensors[f"{name}_a"].shape[0], tensors[f"{name}_b"].shape[-1]
    return ()
