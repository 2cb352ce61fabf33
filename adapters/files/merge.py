"""`merge_files`, adapters merged into a checkpoint from disk to disk, with a few tensors at a time in memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import fluxion
import weights
from adapters.errors import AdapterError
from adapters.files.checkpoint import Checkpoint
from adapters.files.resolve.path_index import CheckpointWeight
from adapters.files.resolve.resolved import ResolvedAdapter, resolve_all
from adapters.files.restore import restore_all
from adapters.files.skeleton import Skeleton
from adapters.files.sources import Given, Source, naming, read_all
from adapters.layers.dtypes import widened
from adapters.lowrank.accumulate import add
from adapters.lowrank.low_rank import LowRank
from adapters.methods import METHODS
from adapters.methods.core.method import Active, Branch
from adapters.runtime.merged_weights import adapted_weights, is_low_rank, updates_of
from weights.tensors.open import bytes_of
from weights.tensors.rewrite import ByRows, Change


def merge_files(
    base: str | PathLike[str],
    sources: Mapping[Any, float] | Iterable[tuple[Source, float]],
    destination: str | PathLike[str],
    *,
    dtype: torch.dtype | None = None,
    max_shard_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Merge adapters into a checkpoint without making the model.

    The result equals that of `load` and `Patch.merge` in memory, to rounding. Tensors that no adapter changes are
    copied. At any moment a few tensors are in memory, and the adapters. Numbers are computed in at least single
    precision, and rounded once.

    The destination appears when it is whole. A call that was cut off, even by `kill -9`, resumes where it stopped when
    it is made again.

    Args:
        base: A safetensors file, a folder of transformers or diffusers with one or with shards, that of a whole
            pipeline, or a place on the Hub.
        sources: Sources that `weights.read_adapter` reads, or files that it has read, each with its scale, in the
            order in which they are merged.
        destination: The name of a `.safetensors` file, which is replaced if it exists; or that of a new folder, where
            the settings and the tokenizer of the base go too.
        dtype: The dtype that floating-point tensors are converted to; by default they stay as they are.
        max_shard_size: The largest number of bytes of tensors in a file of a folder; by default the files are as in
            the base.
        progress: Called with the number of bytes written so far, and the total.

    Returns:
        The destination as given.

    Raises:
        LayerMismatchError: An adapter does not fit the base: the message lists where.
        AdapterError: An adapter cannot be merged, or the checkpoint has no place for the result.
        weights.WeightsError: A source cannot be read, or the destination cannot be written.

    Example:
        >>> sources = {"style.safetensors": 0.7, "someone/pose-lora": 0.3}
        >>> path = adapters.merge_files("someone/model", sources, "merged")
        >>> merged = weights.open(path)
    """
    checkpoint = Checkpoint.open(base)
    _check_settings(checkpoint)
    given = read_all(sources)
    if not given:
        raise AdapterError("There are no adapters to merge: give some, with their scales.")
    resolved: list[ResolvedAdapter[CheckpointWeight]] = []
    for name, file, _ in given:
        with naming(name):
            _check_mergeable(file)
            resolved.append(resolve_all(checkpoint.index, file))
    key = _fingerprint(resolved, [scale for *_, scale in given])
    branches = _branches(checkpoint, given, resolved)
    changes = dict(_changes(checkpoint, branches, dtype))
    _check_tied(checkpoint, branches)
    return weights.rewrite(
        base, destination, changes, key=key, dtype=dtype, max_shard_size=max_shard_size, progress=progress
    )


def _check_settings(checkpoint: Checkpoint) -> None:
    for settings in checkpoint.settings.values():
        if settings.get("quantization_config"):
            raise AdapterError(
                f"{checkpoint.source} is quantized, and its numbers are codes: merge into the model it was made of."
            )


def _check_mergeable(file: weights.AdapterFile) -> None:
    for path, layer in file.layers.items():
        if layer.method in METHODS and not METHODS[layer.method].mergeable:
            raise AdapterError(
                f"{path or 'it'} cannot be merged: {METHODS[layer.method].__name__} does not change weights. Load it at"
                " run time."
            )
    if file.counted:
        raise AdapterError("It numbers layers instead of naming them: load it into the model, and merge it in memory.")


def _branches(
    checkpoint: Checkpoint, given: Sequence[Given], resolved: Sequence[ResolvedAdapter[CheckpointWeight]]
) -> dict[str, Active]:
    """The branches of all adapters by the path of their module in the checkpoint, each with its scale."""
    modules = {layer.weight.path: layer.weight.module for adapter in resolved for layer in adapter.layers}
    active: dict[str, Active] = {}
    targets = Skeleton(checkpoint.infos).targets_of(resolved, checkpoint.read)
    for (name, file, scale), layers in zip(given, targets, strict=True):
        with naming(name):
            for target, branch in restore_all(layers, file):
                active.setdefault(modules[target.path], []).append((branch, scale))
    return active


def _changes(
    checkpoint: Checkpoint, branches: Mapping[str, Active], dtype: torch.dtype | None
) -> Iterator[tuple[str, Change]]:
    """The change of each tensor of a checkpoint that branches change, by its name."""
    for path, there in branches.items():
        for name in dict.fromkeys(name for branch, _ in there for name in branch.names):
            active, others = _involved(there, name)
            full = f"{path}.{name}"
            if full in checkpoint.infos:
                if checkpoint.is_quantized(full):
                    kind = checkpoint.infos[full].dtype
                    raise AdapterError(f"{full} is quantized, to {kind}: merge into the model it was made of.")
                if all(is_low_rank(branch, name) for branch, _ in active):
                    yield full, ByRows(_LowRankRows(active, checkpoint.infos[full].shape[0], dtype))
                else:
                    yield full, partial(_changed, checkpoint, path, name, others, active, dtype)
            elif any(_makes_bias(branch) for branch, _ in active):
                raise AdapterError(
                    f"{full} is not in the checkpoint, and would be new: {active[0][0].method} adds a bias, which the"
                    " model that is made from the settings has no place for. Merge it in memory."
                )


def _involved(branches: Active, name: str) -> tuple[Active, list[str]]:
    """The branches that a merged parameter depends on, and the other parameters that it depends on."""
    names = {name}
    while True:
        active = [(branch, scale) for branch, scale in branches if names.intersection(branch.names)]
        known = names.union(*(branch.names for branch, _ in active))
        if known == names:
            return active, sorted(names - {name})
        names = known


def _makes_bias(branch: Branch) -> bool:
    """Whether a layer without a bias gets one."""
    weight = torch.empty(branch.matrix.shape, device="meta")
    return len(branch.names) > 1 and branch.method.update_bias(None, weight, branch.values()) is not None


def _check_tied(checkpoint: Checkpoint, branches: Mapping[str, Active]) -> None:
    """Raise an AdapterError for an adapter of one of two weights that are one tensor: it would be changed for both."""
    tied = checkpoint.tied()
    for path, active in branches.items():
        if f"{path}.weight" in tied and not all(branch.matrix.kind == "any" for branch, _ in active):
            raise AdapterError(
                f"{path} is the embedding and the output head of the model at once, and the adapter is for one of"
                " them: merge it in memory, into a model with tie_word_embeddings=False."
            )


def _fingerprint(resolved: Sequence[ResolvedAdapter[CheckpointWeight]], scales: Sequence[float]) -> str:
    """A hash of adapters and their scales."""
    digest = hashlib.sha256(fluxion.__version__.encode())
    for adapter, scale in zip(resolved, scales, strict=True):
        digest.update(json.dumps(scale).encode())
        layers = [(weight.path, layer) for weight, layer, _ in adapter.layers]
        content = [(path, layer.method, dict(layer.hyperparameters)) for path, layer in layers]
        digest.update(json.dumps(content, default=str).encode())
        tensors = [(path, name, tensor) for path, layer in layers for name, tensor in layer.tensors.items()]
        for path, name, tensor in (*tensors, *(("", name, tensor) for name, tensor in adapter.file.shared.items())):
            digest.update(json.dumps([path, name, str(tensor.dtype), [*tensor.shape]]).encode())
            digest.update(bytes_of(tensor.detach().cpu().contiguous()))
    return digest.hexdigest()


# One tensor


def _changed(
    checkpoint: Checkpoint,
    path: str,
    name: str,
    others: Sequence[str],
    active: Active,
    dtype: torch.dtype | None,
    tensor: Tensor,
) -> Tensor:
    """A parameter with branches merged into it.

    Args:
        checkpoint: The checkpoint, from which other parameters are read.
        path: The path of the layer.
        name: The name of the parameter.
        others: The names of other parameters of the layer that it depends on.
        active: The branches and their scales.
        dtype: A dtype that the result is converted to later, so that it must not be rounded to that of the parameter.
        tensor: The parameter.
    """
    tensor = tensor if dtype is None else widened(tensor)
    with torch.no_grad():
        infos = checkpoint.infos
        own: dict[str, Tensor | None] = {
            other: checkpoint.read(f"{path}.{other}") if f"{path}.{other}" in infos else None for other in others
        }
        return cast(Tensor, adapted_weights({**own, name: tensor}, active)[name])


class _LowRankRows:
    """Adds low-rank updates to rows of a weight in place.

    Attributes:
        active: The branches and their scales.
        count: The number of rows of the weight.
        dtype: As of `_changed`.
    """

    def __init__(self, active: Active, count: int, dtype: torch.dtype | None) -> None:
        self.active, self.count, self.dtype = active, count, dtype
        self._updates: list[LowRank] = []  # While rows of this weight are changed.

    def __call__(self, rows: Tensor, first: int) -> Tensor:
        rows = rows if self.dtype is None else widened(rows)
        if not self._updates:
            self._updates = updates_of(self.active, rows)
        add(rows, self._updates, first)
        if first + len(rows) == self.count:
            self._updates = []
        return rows
