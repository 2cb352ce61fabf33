"""Merging from disk to disk: adapters folded into a checkpoint, of which a few tensors at a time are in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import fluxion
import weights
from adapters.activation.switch import finite
from adapters.errors import AdapterError, refuse
from adapters.files.checkpoint import Checkpoint
from adapters.files.load import load
from adapters.files.resolve.checkpoint_names import other_base
from adapters.files.resolve.placing import place, standins, tied_names
from adapters.layers.dtypes import widened
from adapters.lowrank.accumulate import Product, add
from adapters.methods import METHODS
from adapters.methods.core.method import Active, Branch
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.runtime.merged_weights import adapted_weights, is_low_rank, products_of
from weights.tensors.open import bytes_of, read_settings
from weights.tensors.rewrite import ByRows, Change

Source = str | PathLike[str] | weights.AdapterFile


def merge_files(
    base: str | PathLike[str],
    sources: Mapping[Any, float] | Iterable[tuple[Source, float]],
    destination: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Fold adapters into a checkpoint without making the model.

    What comes out is what `load` and `Patch.merge` make of the model in memory, to rounding. Tensors that no adapter
    changes are copied. At any moment a few tensors are in memory, and the adapters. Numbers are computed in at least
    single precision, and rounded once.

    The destination appears when it is whole. A call that was cut off, even by `kill -9`, goes on where it stopped when
    it is made again.

    Args:
        base: A safetensors file, a folder of transformers or diffusers with one or with shards, that of a whole
            pipeline, or a place on the Hub.
        sources: What `weights.read_adapter` reads, or what it has read, and how strongly each acts, in the order in
            which they are folded in.
        destination: The name of a `.safetensors` file, which is replaced if it exists; or that of a new folder, where
            the settings and the tokenizer of the base go too.
        dtype: What floating-point tensors are converted to; by default they stay as they are.
        max_shard_size: How many bytes of tensors a file in a folder may have; by default the files are as in the base.
        progress: Called with the number of bytes that are written, and that of all.

    Returns:
        The destination as given.

    Raises:
        LayerMismatchError: An adapter does not fit the base: the message lists where.
        AdapterError: An adapter has no merged form, or the checkpoint has no place for what comes out.
        weights.WeightsError: A source cannot be read, or the destination cannot be written.

    Example:
        >>> adapters.merge_files("someone/model", {"style.safetensors": 0.7, "someone/pose-lora": 0.3}, "merged")
    """
    checkpoint, settings = Checkpoint.open(base), read_settings(base)
    _check_settings(base, settings)
    given = read_all(sources)
    if not given:
        raise AdapterError("There are no adapters to merge: give some, with their scales.")
    for number, (name, file, scale) in enumerate(given):
        with naming(name):
            given[number] = name, _placed(checkpoint, settings, file), scale
    key = _fingerprint(given)
    model = standins(checkpoint.slots, [file for _, file, _ in given], checkpoint.read)
    while given:
        name, file, scale = given.pop(0)
        with naming(name):
            load(model, file, name=f"{len(given)}", scale=scale)
        del file  # The patch has tensors of its own.
    changes = dict(_changes(model, checkpoint, dtype))
    _check_tied(model, checkpoint, settings)
    return weights.rewrite(
        base, destination, changes, key=key, dtype=dtype, max_shard_size=max_shard_size, progress=progress
    )


def read_all(
    sources: Mapping[str | PathLike[str], float] | Iterable[tuple[Source, float]],
) -> list[tuple[str, weights.AdapterFile, float]]:
    """Adapters from where they are, each with what to call it and its scale."""
    given: list[tuple[str, weights.AdapterFile, float]] = []
    for number, (source, scale) in enumerate(sources.items() if isinstance(sources, Mapping) else sources, start=1):
        name, file = f"Adapter {number}", source
        if not isinstance(file, weights.AdapterFile):
            name, file = str(source), weights.read_adapter(source)
        given.append((name, file, finite(scale, f"The scale of {name}")))
    return given


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors in this block begin with the name of an adapter."""
    try:
        yield
    except AdapterError as error:
        raise type(error)(f"{name}: {error}") from error


# What goes where


def _check_settings(base: str | PathLike[str], settings: Mapping[str, Mapping[str, Any]]) -> None:
    for said in settings.values():
        if said.get("quantization_config"):
            raise AdapterError(f"{base} is quantized, and its numbers are codes: merge into the model it was made of.")


def _placed(
    checkpoint: Checkpoint, settings: Mapping[str, Mapping[str, Any]], file: weights.AdapterFile
) -> weights.AdapterFile:
    """An adapter with the paths that its layers have in a checkpoint; raises an AdapterError where that has none."""
    for path, layer in file.layers.items():
        if layer.method in METHODS and not METHODS[layer.method].mergeable:
            what = METHODS[layer.method].__name__
            raise AdapterError(f"{path or 'it'} cannot be merged: {what} is no change of weights. Load it at run time.")
    if file.counted:
        raise AdapterError("It has numbers for layers, which only the model tells: load and merge it in memory.")
    placed, _, problems = place(checkpoint, settings, file)
    refuse(other_base(file), problems)
    return placed


def _changes(model: nn.Module, checkpoint: Checkpoint, dtype: torch.dtype | None) -> Iterator[tuple[str, Change]]:
    """What becomes of each tensor of a checkpoint that the patches of a model change, by its name."""
    for path, node in model._modules.items():
        if not isinstance(node, AdaptedLayer):
            continue
        for name in dict.fromkeys(name for branch in node.branches for name in branch.names):
            active, others = _involved(node.branches, name)
            full = f"{path}.{name}"
            if full in checkpoint.slots:
                if checkpoint.is_quantized(full):
                    kind = checkpoint.slots[full].dtype
                    raise AdapterError(f"{full} is quantized, to {kind}: merge into the model it was made of.")
                if all(is_low_rank(branch, name) for branch, _ in active):
                    yield full, ByRows(_LowRankRows(active, checkpoint.slots[full].shape[0], dtype))
                else:
                    yield full, partial(_changed, checkpoint, path, name, others, active, dtype)
            elif any(_makes_bias(branch) for branch, _ in active):
                raise AdapterError(
                    f"{full} is not in the checkpoint, and would be new: {active[0][0].method} adds a bias, which the"
                    " model that is made from the settings has no place for. Merge it in memory."
                )


def _involved(branches: Sequence[Branch], name: str) -> tuple[Active, list[str]]:
    """The branches on which it depends what becomes of a parameter, and the other parameters."""
    names = {name}
    while True:
        active = [(branch, branch.switch.scale) for branch in branches if names.intersection(branch.names)]
        known = names.union(*(branch.names for branch, _ in active))
        if known == names:
            return active, sorted(names - {name})
        names = known


def _makes_bias(branch: Branch) -> bool:
    """Whether a layer without a bias gets one."""
    weight = torch.empty(branch.matrix.shape, device="meta")
    return len(branch.names) > 1 and branch.method.update_bias(None, weight, branch.values()) is not None


def _check_tied(model: nn.Module, checkpoint: Checkpoint, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise an AdapterError for an adapter of one of two weights that are one tensor: it would be changed for both."""
    tied = tied_names(checkpoint, settings)
    for path, node in model._modules.items():
        whole = not isinstance(node, AdaptedLayer) or all(branch.matrix.kind == "any" for branch in node.branches)
        if f"{path}.weight" in tied and not whole:
            raise AdapterError(
                f"{path} is the embedding and the output head of the model at once, and the adapter is for one of"
                " them: merge it in memory, into a model with tie_word_embeddings=False."
            )


def _fingerprint(given: Sequence[tuple[str, weights.AdapterFile, float]]) -> str:
    """Equal for the same adapters at the same strengths."""
    digest = hashlib.sha256(fluxion.__version__.encode())
    for _, file, scale in given:
        digest.update(json.dumps(scale).encode())
        content = [(path, layer.method, dict(layer.hyperparameters)) for path, layer in file.layers.items()]
        digest.update(json.dumps(content, default=str).encode())
        tensors = [
            (path, name, tensor) for path, layer in file.layers.items() for name, tensor in layer.tensors.items()
        ]
        for path, name, tensor in (*tensors, *(("", name, tensor) for name, tensor in file.shared.items())):
            digest.update(json.dumps([path, name, str(tensor.dtype), [*tensor.shape]]).encode())
            digest.update(bytes_of(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


# What becomes of a tensor


def _changed(
    checkpoint: Checkpoint,
    path: str,
    name: str,
    others: Sequence[str],
    active: Active,
    dtype: torch.dtype | None,
    tensor: Tensor,
) -> Tensor:
    """A parameter with branches folded in.

    Args:
        checkpoint: What has the others.
        path: The layer.
        name: The parameter.
        others: Other parameters of the layer that it depends on.
        active: The branches, and how strongly each acts.
        dtype: Whether it is to be of another type, and so must not be rounded to its own.
        tensor: The parameter.
    """
    tensor = tensor if dtype is None else widened(tensor)
    with torch.no_grad():
        slots = checkpoint.slots
        own: dict[str, Tensor | None] = {
            other: checkpoint.read(f"{path}.{other}") if f"{path}.{other}" in slots else None for other in others
        }
        return cast(Tensor, adapted_weights({**own, name: tensor}, active)[name])


class _LowRankRows:
    """Adds products of factors to rows of a weight in place.

    Attributes:
        active: The branches, and how strongly each acts.
        count: How many rows the weight has.
        dtype: As of `_changed`.
    """

    def __init__(self, active: Active, count: int, dtype: torch.dtype | None) -> None:
        self.active, self.count, self.dtype = active, count, dtype
        self._products: list[Product] = []  # While rows of this weight are changed.

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        rows = rows if self.dtype is None else widened(rows)
        if not self._products:
            self._products = products_of(self.active, rows)
        add(rows, self._products, first)
        if first + len(rows) == self.count:
            self._products = []
        return rows
