"""Adapters in files made into one, or into one of lower rank, without the model that they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import nn

import weights
from adapters.errors import AdapterError, refuse
from adapters.files.checkpoint import Checkpoint
from adapters.files.extract import Reduction, written
from adapters.files.load import load
from adapters.files.merge import Source, naming, read_all
from adapters.files.resolve.checkpoint_names import other_base
from adapters.files.resolve.placing import place, standins
from adapters.methods import METHODS
from adapters.methods.copied import Copy
from adapters.methods.lora import LoRA
from adapters.patch.combine import combine
from weights.disk.header import Slot
from weights.tensors.open import read_settings


def combine_files(
    sources: Mapping[str | PathLike[str], float] | Iterable[tuple[Source, float]],
    destination: str | PathLike[str],
    *,
    base: str | PathLike[str] | None = None,
    how: str = "exact",
    rank: int | None = None,
    energy: float | None = None,
    density: float | None = None,
    seed: int | None = None,
    format: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Reduction:
    """Write a LoRA that stands for a weighted sum of adapters in files.

    Args:
        sources: What `weights.read_adapter` reads, or what it has read, and the weights.
        destination: Where the adapter goes: a folder, or the name of a `.safetensors` file where the format has those.
        base: The base model, of which nothing but names and shapes is read. It is needed where the files do not say
            enough: for other methods than LoRA, for those of an original model, and for names without dots, unless the
            result may have such names too, as a `.safetensors` file of LyCORIS, which then is the default.
        how: As of `combine`.
        rank: As of `combine`.
        energy: As of `combine`.
        density: As of `combine`.
        seed: As of `combine`.
        format: As of `Patch.save_pretrained`.
        progress: Called with the number of layers that are done, and that of all.

    Returns:
        The ranks, and how far each layer is off the sum that it stands for.

    Raises:
        LayerMismatchError: An adapter does not fit the base or the others: the message lists where.
        AdapterError: As of `combine`; or the base is needed.
        weights.WeightsError: A source cannot be read, or the destination cannot be written.

    Example:
        >>> adapters.combine_files({"style.safetensors": 0.7, "someone/pose-lora": 0.3}, "both", how="svd", rank=16)
    """
    given = read_all(sources)
    if not given:
        raise AdapterError("There are no adapters to combine: give some, with their weights.")
    flattened = base is None and all(file.flattened for _, file, _ in given)
    if flattened and Path(destination).suffix == ".safetensors":
        format = format or "lycoris"
    files, model, components = _placed(given, base, flattened and format == "lycoris")
    # What a single adapter has whole, beside updates of low rank, stays as it is.
    whole = {path: layer for path, layer in files[0].layers.items() if layer.method == Copy.key and len(files) == 1}
    weighted: dict[str, float] = {}
    for (name, _, weight), file in zip(given, files, strict=True):
        name = f"{name} again" if name in weighted else name
        with naming(name):
            load(model, replace(file, layers={p: x for p, x in file.layers.items() if p not in whole}), name=name)
        weighted[name] = weight
    patch = combine(
        model,
        weighted,
        name=f"combined {' and '.join(weighted)}",
        how=how,
        rank=rank,
        energy=energy,
        density=density,
        seed=seed,
        progress=progress,
    )
    made = patch.adapter_file()
    file = replace(
        made,
        layers={**made.layers, **whole},
        base_model=next((file.base_model for _, file, _ in given if file.base_model), str(base) if base else None),
        task=next((file.task for _, file, _ in given if file.task), None),
        base_structure=None,
        components=components,
        flattened=flattened,
    )
    return written(file, destination, format, patch.errors)


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
        source: What `weights.read_adapter` reads, or what it has read. What it has whole, such as modules to save in
            PEFT's files, is kept.
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
        >>> adapters.resize_file("style.safetensors", "smaller", energy=0.95)
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


def _placed(
    given: list[tuple[str, weights.AdapterFile, float]], base: str | PathLike[str] | None, flattened: bool
) -> tuple[list[weights.AdapterFile], nn.Module, tuple[str, ...]]:
    """The adapters with the names of one model, layers without values to put them into, and the models' names.

    Args:
        given: The adapters, each with what to call it and its weight.
        base: Their base model, if that is given.
        flattened: Whether names without dots will do.
    """
    if base is None:
        slots: dict[str, Slot] = {}
        for name, file, _ in given:
            with naming(name):
                slots.update(_shown(replace(file, flattened=file.flattened and not flattened)))
        files = [replace(file, components=(), flattened=False) for _, file, _ in given]
        components = tuple(dict.fromkeys(part for _, file, _ in given for part in file.components))
        return files, standins(slots, files), components
    checkpoint, settings, files = Checkpoint.open(base), read_settings(base), []
    for name, file, _ in given:
        with naming(name):
            there, _, problems = place(checkpoint, settings, file)
            refuse(other_base(file), problems)
            files.append(there)
    components, front = tuple(checkpoint.parts), ""
    if "" in components:  # One model, which has no name but may have one in the adapters.
        names = {part for _, file, _ in given for part in file.components or ("",)}
        components = tuple(filter(None, names)) if len(names) == 1 else ()
        front = "".join(f"{part}." for part in components)
    slots = {f"{front}{name}": slot for name, slot in checkpoint.slots.items()}
    files = [replace(file, layers={f"{front}{path}": x for path, x in file.layers.items()}) for file in files]
    return files, standins(slots, files, lambda name: checkpoint.read(name.removeprefix(front))), components


def _shown(file: weights.AdapterFile) -> Iterator[tuple[str, Slot]]:
    """The weights that a file is for, as far as it shows them; raises an AdapterError where that is not enough."""
    if file.flattened or file.counted or file.interleaved:
        raise AdapterError(
            "It does not have the names of the model's layers: give its base model, or, where only the dots are"
            " missing, write a .safetensors file in the format lycoris, which has none either."
        )
    for path, layer in file.layers.items():
        a, b = (next((x for key, x in layer.tensors.items() if key.endswith(end)), None) for end in ("_A", "_B"))
        if layer.method in METHODS and layer.method != Copy.key and not METHODS[layer.method].additive:
            what = METHODS[layer.method].__name__
            raise AdapterError(f"What {what} changes at {path} is no update that could be added to another.")
        if layer.method == Copy.key:
            for name, tensor in layer.tensors.items():
                yield f"{path.removesuffix(f'.{name}')}.{name}", Slot(tensor.dtype, tuple(tensor.shape), 0, 0)
        elif layer.method != LoRA.key or a is None or b is None or not 2 <= a.ndim == b.ndim:
            raise AdapterError(f"What it has for {path} does not show the shape of the weight: give its base model.")
        elif "lora_A" in layer.tensors:
            yield f"{path}.weight", Slot(a.dtype, (len(b), *a.shape[1:]), 0, 0)
        else:
            yield f"{path}.weight", Slot(a.dtype, (a.shape[1], len(b)), 0, 0)
