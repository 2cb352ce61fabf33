"""`report`: the update of each layer, its norm and singular-value spectrum, the overlap of adapters, and their fit."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

import weights
from adapters.errors import AdapterError
from adapters.files.checkpoint import Checkpoint
from adapters.files.load import last_part
from adapters.files.resolve.path_index import flat
from adapters.layers.dtypes import widened
from adapters.lowrank.low_rank import LowRank
from adapters.lowrank.spectra import Spectrum, Update, inner, is_finite, shared_directions
from adapters.patch.patch import Patch
from adapters.reports.facts import AdapterReport, Facts, Layer, LayerOverlap, Overlap
from adapters.reports.fit import Fitted, fit, fit_alone, update_of
from adapters.reports.html import fragment, page
from weights.disk.atomic import write_files
from weights.hub.layer_tree import natural

Source = str | PathLike[str] | weights.AdapterFile | Patch


@dataclass(frozen=True)
class Report(Facts):
    """The facts on adapters that `report` returns. A notebook shows it.

    Example:
        >>> found = adapters.report("someone/style-lora", base="someone/model")
        >>> found.adapters[0].layers[0].relative
        >>> found.save("report.html")
    """

    def to_html(self) -> str:
        """The report as one page that needs nothing else. Equal reports give equal pages.

        Raises:
            AdapterError: The library that draws the charts is not installed.
        """
        return page(self)

    def save(self, path: str | PathLike[str]) -> Path:
        """Write the page, whole or not at all.

        Returns:
            The path as given.

        Raises:
            AdapterError: The library that draws the charts is not installed.
            weights.FileWriteError: The system refused to write.
        """
        path = Path(path)
        write_files({path: [self.to_html().encode()]})
        return path

    def _repr_html_(self) -> str:
        return fragment(self)


def report(
    sources: Source | Sequence[Source],
    base: str | PathLike[str] | None = None,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Measure an adapter, or several and their overlap.

    Updates are measured as matrices of outputs by inputs, at scale 1, and one weight at a time: of the base, one tensor
    is in memory. Products of low rank are never made in full. Without a base, only LoRA, LoHa and LoKr are measured,
    whose files show the shapes.

    Args:
        sources: Sources that `weights.read_adapter` reads, files that it has read, or patches; one or several.
        base: The model that they are for, as a safetensors file, a folder of transformers or diffusers, also of a whole
            pipeline, or a place on the Hub. Only tensors that an adapter changes are read.
        progress: Called with the number of weights done so far, and the total.

    Raises:
        AdapterError: There is nothing to report on.
        weights.WeightsError: A source cannot be read.

    Example:
        >>> found = adapters.report(["someone/style-lora", "pose.safetensors"], base="someone/model")
        >>> found.overlaps[0].cosine
        >>> found.save("report.html")
    """
    alone = isinstance(sources, (str, PathLike, weights.AdapterFile, Patch))
    given: Sequence[Source] = [sources] if alone else sources  # type: ignore[list-item, assignment]
    if not given:
        raise AdapterError("There is nothing to report on: give an adapter, or several.")
    checkpoint = None if base is None else Checkpoint.open(base)
    files = [_read(source) for source in given]
    fitted = [fit_alone(file) if checkpoint is None else fit(file, checkpoint) for file in files]
    names = _names(given)
    pairs = {(a, b): _Pair() for a, b in combinations(range(len(given)), 2)}
    layers: list[list[Layer]] = [[] for _ in given]
    weight_of = _weight_of(checkpoint)
    paths = sorted(_common(fitted).items(), key=lambda item: natural(item[0]))
    with torch.no_grad():
        for done, (name, own) in enumerate(paths, start=1):
            found: dict[int, tuple[Update, Spectrum]] = {}
            for number, path in own.items():
                layer, measured = _measure(fitted[number], path, weight_of)
                layers[number].append(replace(layer, path=name))
                if measured is not None:
                    found[number] = measured
            for (a, b), pair in pairs.items():
                pair.add(name, found.get(a), found.get(b))
            if progress is not None:
                progress(done, len(paths))
    return Report(
        None if base is None else str(base),
        tuple(map(_facts, names, given, files, fitted, layers)),
        tuple(pair.overlap(names[a], names[b]) for (a, b), pair in pairs.items()),
        {} if checkpoint is None else _untouched(checkpoint, fitted),
    )


def _read(source: Source) -> weights.AdapterFile:
    if isinstance(source, Patch):
        return source.adapter_file()
    return source if isinstance(source, weights.AdapterFile) else weights.read_adapter(source)


def _where(source: Source) -> str:
    """The source of an adapter, or the name of a patch."""
    if isinstance(source, Patch):
        return source.name
    return "" if isinstance(source, weights.AdapterFile) else str(source)


def _names(sources: Sequence[Source]) -> list[str]:
    """The names of adapters: the last part of the source, or all of it where others end so too."""
    full = [_where(source) or "adapter" for source in sources]
    short = [last_part(name) for name in full]
    names = [last if short.count(last) == 1 else whole for last, whole in zip(short, full, strict=True)]
    count: Counter[str] = Counter()
    for number, name in enumerate(names):
        count[name] += 1
        names[number] = name if count[name] == 1 else f"{name} ({count[name]})"
    return names


def _common(fitted: Sequence[Fitted]) -> dict[str, dict[int, str]]:
    """The path of each weight in every adapter by the number of the adapter, by the path with the most dots."""
    flattened = any(one.file.flattened for one in fitted)
    bare = any(not one.file.components for one in fitted)  # One that does not name its model.
    common: dict[str, dict[int, str]] = {}
    for number, one in enumerate(fitted):
        for path in one.file.layers:
            name = one.file.component_of(path)[1] if bare and len(one.file.components) == 1 else path
            common.setdefault(flat(name) if flattened else name, {})[number] = path
    return {max(own.values(), key=lambda path: path.count(".")): own for own in common.values()}


def _facts(
    name: str, source: Source, file: weights.AdapterFile, fitted: Fitted, layers: Sequence[Layer]
) -> AdapterReport:
    own = chain.from_iterable(layer.tensors.values() for layer in file.layers.values())
    tensors = [*own, *file.shared.values(), *file.others.values()]
    dtypes: Counter[str] = Counter()
    for tensor in tensors:
        dtypes[str(tensor.dtype).removeprefix("torch.")] += tensor.numel()
    return AdapterReport(
        name,
        _where(source),
        file.format,
        file.base_model,
        file.task,
        dtypes.total(),
        sum(tensor.nbytes for tensor in tensors),
        dict(dtypes.most_common()),
        dict(file.metadata),
        tuple(layers),
        fitted.fit,
    )


def _untouched(checkpoint: Checkpoint, fitted: Iterable[Fitted]) -> dict[str, tuple[int, ...]]:
    touched = {path for one in fitted for path in one.file.layers}
    shapes = {
        name.removesuffix(".weight"): info.shape
        for name, info in checkpoint.infos.items()
        if name.endswith(".weight") and len(info.shape) > 1
    }
    return {path: shapes[path] for path in sorted(shapes, key=natural) if path not in touched}


# One weight


_Weight = Callable[[str], tuple[Tensor | None, float | None]]


def _weight_of(checkpoint: Checkpoint | None) -> _Weight:
    """A reader of weights of the base, in at least single precision, with their norms; None for codes and absent ones.

    The last weight is kept, as several adapters may change it.
    """
    last: tuple[str | None, Tensor | None, float | None] = (None, None, None)

    def weight_of(name: str) -> tuple[Tensor | None, float | None]:
        nonlocal last
        if checkpoint is None or name not in checkpoint.infos or not checkpoint.infos[name].dtype.is_floating_point:
            return None, None
        if last[0] != name:
            last = (None, None, None)  # So that there is only one at a time.
            tensor = widened(checkpoint.read(name))
            last = (name, tensor, float(torch.linalg.vector_norm(tensor, dtype=torch.float64)))
        return last[1:]

    return weight_of


def _measure(fitted: Fitted, path: str, weight_of: _Weight) -> tuple[Layer, tuple[Update, Spectrum] | None]:
    """The facts on one layer, and its update and spectrum where there are any."""
    content = fitted.file.layers[path]
    count = sum(tensor.numel() for tensor in content.tensors.values())
    layer = Layer(path, content.method, dict(content.hyperparameters), count, note=fitted.notes.get(path, ""))
    if path not in fitted.branches:
        return layer, None
    name, branch = fitted.branches[path]
    weight, size = weight_of(name)
    update = update_of(branch, weight)
    layer = replace(layer, shape=branch.matrix.shape if update is None else update.shape, weight_norm=size)
    if update is None:
        return replace(layer, note="its update depends on the weight, of which the base has no numbers"), None
    if not is_finite(update):
        return replace(layer, note="it has NaN or infinity"), None
    if not isinstance(update, LowRank) and update.ndim < 2:
        norm = float(torch.linalg.vector_norm(update.double()))
        return replace(layer, norm=norm, relative=norm / size if size else None), None
    spectrum = Spectrum.of(update)
    layer = replace(
        layer,
        norm=spectrum.norm,
        relative=spectrum.norm / size if size else None,
        singular_values=spectrum.values,
        effective_rank=spectrum.effective_rank,
        stable_rank=spectrum.stable_rank,
    )
    return layer, (update, spectrum)


class _Pair:
    """The overlap of two adapters, summed up weight by weight."""

    def __init__(self) -> None:
        self.product = self.first = self.second = 0.0  # ⟨D₁, D₂⟩ and the squares of ‖D₁‖ and ‖D₂‖, of all weights.
        self.layers: list[LayerOverlap] = []

    def add(self, path: str, a: tuple[Update, Spectrum] | None, b: tuple[Update, Spectrum] | None) -> None:
        self.first += a[1].norm ** 2 if a else 0.0
        self.second += b[1].norm ** 2 if b else 0.0
        if a is None or b is None or a[0].shape != b[0].shape:
            return
        product, size = inner(a[0], b[0]), a[1].norm * b[1].norm
        self.product += product
        if size and (shared := shared_directions(a[1], b[1])):
            self.layers.append(LayerOverlap(path, product / size, *shared))

    def overlap(self, a: str, b: str) -> Overlap:
        size = math.sqrt(self.first * self.second)
        return Overlap(a, b, self.product / size if size else None, tuple(self.layers))
