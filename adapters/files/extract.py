"""What a model was tuned to, as a LoRA: the difference of two checkpoints, of which a few tensors are in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

import weights
from adapters.errors import AdapterError
from adapters.files.checkpoint import Checkpoint
from adapters.files.resolve.placing import tied_names
from adapters.files.skeleton import Shapes
from adapters.layers.dtypes import widened
from adapters.lowrank.svd import nearest
from adapters.methods.lora import LoRA
from adapters.patch.attachment import Attachment
from adapters.patch.combine import check_size, lora_of
from adapters.patch.patch import Patch
from adapters.patch.save import write_file
from adapters.targets.pattern import Patterns, as_rules
from adapters.targets.selection import select
from adapters.targets.target import Target, all_targets
from weights.tensors.open import read_settings

_ALL = re.compile(".*", re.DOTALL)
_COUNTS = {torch.int64, torch.bool}  # What is no code of a number.


@dataclass(frozen=True)
class Reduction:
    """An adapter that stands for something else, and how well.

    Attributes:
        path: Where it was written.
        format: The format it is in.
        ranks: The rank at each layer, by path.
        errors: `‖B A - D‖ / ‖D‖` at each layer, in the Frobenius norm, for the update `D` that it stands for. What the
            dtype of the file rounds is included.
        left_out: What no LoRA can hold, by the name of the tensor, and why. It is not in the adapter.
    """

    path: Path
    format: str
    ranks: dict[str, int]
    errors: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)


@torch.no_grad()
def extract_files(
    base: str | PathLike[str],
    tuned: str | PathLike[str],
    destination: str | PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Patterns | None = None,
    exclude: Patterns | None = None,
    dtype: torch.dtype | None = None,
    format: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Reduction:
    """Write a LoRA that stands for the difference of two checkpoints of one model.

    At each layer it is nearly the best of its rank, by a randomised singular value decomposition (arXiv:0909.4061);
    only where most of the full rank is needed a whole matrix is decomposed. Differences are computed in at least single
    precision, one tensor after the other.

    Args:
        base: A safetensors file, a folder of transformers or diffusers with one or with shards, that of a whole
            pipeline, or a place on the Hub.
        tuned: The same of the model that was tuned.
        destination: Where the adapter goes: a folder, or the name of a `.safetensors` file where the format has those.
        rank: The largest rank at a layer.
        energy: The share of the energy of each difference to keep, its squared Frobenius norm, more than 0 and at most
            1: each layer gets about the least rank that keeps it, at most `rank`, if that is given too.
        targets: Patterns of layers, as of `inject`; by default all that differ, the output head too.
        exclude: Patterns of layers to leave out.
        dtype: Of the adapter's tensors; by default that of the tuned ones.
        format: As of `Patch.save_pretrained`.
        seed: Where chance comes from. Torch's generators are not touched.
        progress: Called with the number of bytes that are compared, and that of all.

    Returns:
        The ranks and the errors, and what differs and could not be extracted: biases and norms, tensors of another
        shape, embeddings that are the output head as well, layers that are not chosen.

    Raises:
        TargetError: A pattern matches nothing.
        AdapterError: The checkpoints do not differ in any matrix, or are of other models, or quantized, or a
            difference is not finite, or too large for the dtype; or neither rank nor energy is given.
        weights.WeightsError: A checkpoint cannot be read, or the destination cannot be written.

    Example:
        >>> adapters.extract_files("someone/model", "someone/tuned-model", "out", rank=32)
    """
    if rank is None and energy is None:
        raise AdapterError("Say how large the adapter may be: by rank=, or by the energy= that it has to keep.")
    check_size(rank, energy)
    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    if not before.slots.keys() & after.slots.keys():
        raise AdapterError(f"{base} and {tuned} have no tensor of one name: these are no versions of one model.")
    tied = tied_names(before, read_settings(base))
    generator = torch.Generator().manual_seed(seed)
    model = _model(before)
    here = {_tensor_name(layer): layer for layer in all_targets(model)}
    chosen = set(here)
    if targets is not None or exclude is not None:
        rules = as_rules(LoRA(), _ALL if targets is None else targets)
        chosen = {_tensor_name(layer) for same, _ in select(model, rules, exclude) for layer in same}
    places: list[Attachment] = []
    errors: dict[str, float] = {}
    left_out = dict.fromkeys(before.slots.keys() ^ after.slots.keys(), "only one of the checkpoints has it")
    for name, difference in _differences(before, after, left_out, progress):
        layer = here.get(name)
        matrix = None if layer is None else LoRA().matrix(layer.module, layer.parameter)
        if layer is None or matrix is None:
            left_out[name] = "it is no matrix"
        elif name not in chosen:
            left_out[name] = "it is not chosen"
        elif name in tied:
            left_out[name] = "it is the embedding and the output head at once, and a LoRA is for one of them"
        else:
            update = matrix.read(difference)
            branch = lora_of(layer, nearest(update, rank, energy, generator), dtype or after.slots[name].dtype)
            places.append(Attachment.of(layer, branch))
            up, down = cast(LoRA, branch.method).factors(branch.values(update.dtype))
            size = torch.linalg.vector_norm(update)
            errors[layer.path] = float(torch.linalg.vector_norm(update.sub_(up @ down)) / size)
            if not math.isfinite(errors[layer.path]):
                raise AdapterError(f"{layer.path} has numbers that are too large for its dtype: choose another dtype.")
    if not places:
        why = [f"{name} ({reason})" for name, reason in sorted(left_out.items())[:5]]
        more = f" and {len(left_out) - len(why):,} more" if len(left_out) > len(why) else ""
        differ = f"only in {', '.join(why)}{more}" if left_out else "in nothing"
        raise AdapterError(f"{base} and {tuned} differ {differ}: there is nothing to extract.")
    file = replace(
        Patch("extracted", model, places, 1.0, freezes=False).adapter_file(),
        base_model=str(base),
        base_structure=None,
        components=tuple(part for part in before.parts if part),
    )
    return written(file, destination, format, errors, left_out)


def written(
    file: weights.AdapterFile,
    destination: str | PathLike[str],
    format: str | None,
    errors: Mapping[str, float],
    left_out: Mapping[str, str] | None = None,
) -> Reduction:
    """Write an adapter, of which the errors are known."""
    path = Path(destination)
    ranks = {layer: cast(int, file.layers[layer].hyperparameters["rank"]) for layer in errors}
    return Reduction(path, write_file(file, path, format), ranks, dict(errors), dict(sorted((left_out or {}).items())))


def _model(checkpoint: Checkpoint) -> nn.Module:
    """Layers without values for all tensors of a checkpoint."""
    shapes, root = Shapes(checkpoint.slots), nn.Module()
    for path in shapes.paths:
        root._modules[path] = shapes.layer(path, (), ())
    return root


def _tensor_name(layer: Target) -> str:
    return f"{layer.path}.weight" if layer.parameter == "weight" else layer.path


def _differences(
    before: Checkpoint, after: Checkpoint, left_out: dict[str, str], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    """What of one checkpoint is not as in another, by name; what cannot be compared is left out."""
    both = [name for name in before.slots if name in after.slots]
    sizes = {name: before.slots[name].stop - before.slots[name].start for name in both}
    done = 0
    for name in both:
        done += sizes[name]
        if before.slots[name].shape != after.slots[name].shape:
            left_out[name] = "it has another shape"
        elif (one := before.read(name)).dtype != (other := after.read(name)).dtype or not torch.equal(one, other):
            if {one.dtype, other.dtype} <= _COUNTS:
                left_out[name] = "it has integers"
            elif before.is_quantized(name) or after.is_quantized(name):
                raise AdapterError(f"{name} is quantized, and its numbers are codes: take what it was made of.")
            else:
                difference = widened(other).sub_(widened(one))
                if not difference.isfinite().all():
                    raise AdapterError(f"The difference at {name} is not finite: one of the checkpoints is damaged.")
                if difference.any():
                    yield name, difference
        if progress is not None:
            progress(done, sum(sizes.values()))
