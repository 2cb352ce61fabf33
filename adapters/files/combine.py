"""`combine_files` and `resize_file`, a LoRA that stands for adapters in files, without the model that they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import weights
from adapters.errors import AdapterError
from adapters.files.checkpoint import Checkpoint
from adapters.files.reduction import Reduction, content_of, write_reduction
from adapters.files.resolve.path_index import CheckpointWeight, checkpoint_index
from adapters.files.resolve.resolved import ResolvedAdapter, resolve, resolve_all
from adapters.files.restore import restore_all
from adapters.files.skeleton import Skeleton
from adapters.files.sources import Given, Source, naming, read_all
from adapters.methods import METHODS
from adapters.methods.copied import Copy
from adapters.methods.core.method import Branch
from adapters.methods.lora import LoRA
from adapters.patch.combine import Combination, How, WeightedSum, check_additive
from adapters.targets.target import Target
from weights.disk.header import TensorInfo
from weights.formats import canonical


@torch.no_grad()
def combine_files(
    sources: Mapping[Any, float] | Iterable[tuple[Source, float]],
    destination: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    how: How = "exact",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reduction:
    """Write a LoRA that stands for a weighted sum of adapters in files.

    Args:
        sources: Sources that `weights.read_adapter` reads, or files that it has read, each with its weight in the sum.
        destination: Where the adapter goes: a folder, or the name of a `.safetensors` file where the format has those.
        base: The base model, of which only names and shapes are read. It is needed where the files do not say enough:
            for other methods than LoRA, for names of an original model, and for names without dots, unless the result
            may have such names too, as a `.safetensors` file of LyCORIS, which then is the default.
        how: As of `combine`.
        rank: As of `combine`.
        energy: As of `combine`.
        density: As of `combine`.
        seed: As of `combine`.
        format: As of `Patch.save_pretrained`.
        progress: Called with the number of layers done so far, and the total.

    Returns:
        The ranks, and the relative error of each layer.

    Raises:
        LayerMismatchError: An adapter does not fit the base or the others: the message lists where.
        AdapterError: As of `combine`; or the base is needed.
        weights.WeightsError: A source cannot be read, or the destination cannot be written.

    Example:
        >>> sources = {"style.safetensors": 0.7, "someone/pose-lora": 0.3}
        >>> reduction = adapters.combine_files(sources, "both", how="svd", rank=16)
        >>> max(reduction.errors.values())
    """
    combination = Combination(how, rank, energy, density, seed)
    given = read_all(sources)
    if not given:
        raise AdapterError("There are no adapters to combine: give some, with their weights.")
    flattened = base is None and all(file.flattened for _, file, _ in given)
    if flattened and Path(destination).suffix == ".safetensors":
        format = canonical(format or "lycoris")
    found = _by_themselves(given, flattened and format == "lycoris") if base is None else _in_base(given, base)
    layers: dict[str, weights.LayerWeights] = {}
    errors: dict[str, float] = {}
    sums, copied = _weighted_sums(given, found)
    for number, each in enumerate(sums, start=1):
        branch, error = combination.of(each)
        path = f"{found.prefix}{each.target.path}"
        layers[path], errors[path] = content_of(branch), error
        if progress is not None:
            progress(number, len(sums))
    file = weights.AdapterFile(
        layers | {f"{found.prefix}{path}": content for path, content in copied.items()},
        base_model=next((file.base_model for _, file, _ in given if file.base_model), str(base) if base else None),
        task=next((file.task for _, file, _ in given if file.task), None),
        components=found.components,
        flattened=flattened,
    )
    return write_reduction(file, destination, format, errors)


def resize_file(
    source: Source,
    destination: str | PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    base: str | PathLike[str] | None = None,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reduction:
    """Write a LoRA of lower rank that is the nearest to an adapter, at each layer by itself.

    Args:
        source: A source that `weights.read_adapter` reads, or a file that it has read. Whole copies in it, such as
            modules to save in PEFT's files, are kept.
        destination: As of `combine_files`, like the rest.
        rank: The largest rank at a layer.
        energy: The share of the energy to keep, the squared Frobenius norm of the update, more than 0 and at most 1:
            each layer gets the least rank that keeps it, at most `rank`, if that is given too.
        base: As of `combine_files`.
        format: As of `Patch.save_pretrained`.
        progress: As of `combine_files`.

    Raises:
        AdapterError: Neither rank nor energy is given; or as of `combine_files`.
        weights.WeightsError: The source cannot be read, or the destination cannot be written.

    Example:
        >>> reduction = adapters.resize_file("style.safetensors", "smaller", energy=0.95)
        >>> reduction.ranks
        >>> adapters.load(model, reduction.path)
    """
    if rank is None and energy is None:
        raise AdapterError("Say how large the adapter may be: by rank=, or by the energy= that it has to keep.")
    return combine_files(
        [(source, 1.0)],
        destination,
        base=base,
        how="svd",
        rank=rank,
        energy=energy,
        format=format,
        progress=progress,
    )


@dataclass(frozen=True)
class _Found:
    """Adapters with the paths of one base, and a skeleton of that.

    Attributes:
        adapters: The adapters.
        skeleton: The layers of the base.
        read: Reads a tensor of the base.
        components: The names of the models that it is made of.
        prefix: The component in front of every path that the base does not have, as it is one model.
    """

    adapters: list[ResolvedAdapter[CheckpointWeight]]
    skeleton: Skeleton
    read: Callable[[str], Tensor] | None
    components: tuple[str, ...]
    prefix: str = ""


def _by_themselves(given: Sequence[Given], flattened: bool) -> _Found:
    """Adapters with the paths that they have themselves, and the shapes that their tensors show.

    Args:
        given: The adapters.
        flattened: Whether names without dots will do.
    """
    infos: dict[str, TensorInfo] = {}
    for name, file, _ in given:
        with naming(name):
            infos.update(_shown(replace(file, flattened=file.flattened and not flattened)))
    index = checkpoint_index(infos)
    adapters = [resolve(index, replace(file, components=(), flattened=False)) for _, file, _ in given]
    components = tuple(dict.fromkeys(part for _, file, _ in given for part in file.components))
    return _Found(adapters, Skeleton(infos), None, components)


def _in_base(given: Sequence[Given], base: str | PathLike[str]) -> _Found:
    """Adapters with the paths of a base."""
    checkpoint = Checkpoint.open(base)
    adapters: list[ResolvedAdapter[CheckpointWeight]] = []
    for name, file, _ in given:
        with naming(name):
            adapters.append(resolve_all(checkpoint.index, file))
    components, prefix = tuple(checkpoint.parts), ""
    if "" in components:  # One model, which has no name but may have one in the adapters.
        names = {part for _, file, _ in given for part in file.components or ("",)}
        components = tuple(filter(None, names)) if len(names) == 1 else ()
        prefix = "".join(f"{part}." for part in components)
    return _Found(adapters, Skeleton(checkpoint.infos), checkpoint.read, components, prefix)


def _weighted_sums(given: Sequence[Given], found: _Found) -> tuple[list[WeightedSum], dict[str, weights.LayerWeights]]:
    """The weights that any of the adapters changes, with the branches there; and the copies in a single adapter.

    Copies of whole parameters, beside updates of low rank, stay as they are.
    """
    sources: dict[Target, list[tuple[Branch, float]]] = {}
    names: dict[Target, str] = {}
    copied: dict[str, weights.LayerWeights] = {}
    for (name, file, weight), layers in zip(given, found.skeleton.targets_of(found.adapters, found.read), strict=True):
        if len(given) == 1:
            copied = {target.path: content for target, content, _ in layers if content.method == Copy.key}
        with naming(name):
            some = [layer for layer in layers if layer.weight.path not in copied]
            for target, branch in restore_all(some, file):
                check_additive(name, target.path, branch.method)
                sources.setdefault(target, []).append((branch, weight))
                names.setdefault(target, name)
    return [WeightedSum.of(target, there, names[target]) for target, there in sources.items()], copied


def _shown(file: weights.AdapterFile) -> Iterator[tuple[str, TensorInfo]]:
    """The names and shapes of the weights that a file is for.

    Raises:
        AdapterError: The file does not show them.
    """
    if file.flattened or file.counted or file.interleaved:
        raise AdapterError(
            "It does not have the names of the model's layers: give its base model, or, where only the dots are"
            " missing, write a .safetensors file in the format lycoris, which has none either."
        )
    for path, layer in file.layers.items():
        a, b = (next((x for key, x in layer.tensors.items() if key.endswith(end)), None) for end in ("_A", "_B"))
        if layer.method in METHODS and layer.method != Copy.key and not METHODS[layer.method].additive:
            method = METHODS[layer.method].__name__
            raise AdapterError(f"{path} cannot be combined: the update by {method} depends on the weight.")
        if layer.method == Copy.key:
            for name, tensor in layer.tensors.items():
                yield f"{path.removesuffix(f'.{name}')}.{name}", TensorInfo(tensor.dtype, tuple(tensor.shape), 0, 0)
        elif layer.method != LoRA.key or a is None or b is None or not 2 <= a.ndim == b.ndim:
            raise AdapterError(f"The tensors for {path} do not show the shape of the weight: give its base model.")
        elif "lora_A" in layer.tensors:
            yield f"{path}.weight", TensorInfo(a.dtype, (len(b), *a.shape[1:]), 0, 0)
        else:
            yield f"{path}.weight", TensorInfo(a.dtype, (a.shape[1], len(b)), 0, 0)
