"""`extract_files`, the difference of two checkpoints as a LoRA, with a few tensors at a time in memory."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from os import PathLike
from typing import cast

import torch
from torch import Tensor

import weights
from adapters.errors import AdapterError
from adapters.files.checkpoint import Checkpoint
from adapters.files.reduction import Reduction, content_of, write_reduction
from adapters.files.skeleton import Skeleton
from adapters.layers.dtypes import widened
from adapters.lowrank.svd import nearest
from adapters.methods.lora import LoRA
from adapters.patch.combine import check_size, lora_of
from adapters.targets.pattern import Patterns, as_rules
from adapters.targets.selection import select
from adapters.targets.target import Target, all_targets

_ALL = re.compile(".*", re.DOTALL)
_COUNTS = {torch.int64, torch.bool}  # Not codes of quantized numbers.


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

    At each layer it is nearly the best of its rank, by a randomised singular value decomposition (arXiv:0909.4061). A
    full decomposition is computed only where most of the full rank is needed. Differences are computed in at least
    single precision, one tensor after the other.

    Args:
        base: A safetensors file, a folder of transformers or diffusers with one or with shards, that of a whole
            pipeline, or a place on the Hub.
        tuned: The fine-tuned model, in any of these forms.
        destination: Where the adapter goes: a folder, or the name of a `.safetensors` file where the format has those.
        rank: The largest rank at a layer.
        energy: The share of the energy of each difference to keep, its squared Frobenius norm, more than 0 and at most
            1: each layer gets about the least rank that keeps it, at most `rank`, if that is given too.
        targets: Patterns of layers, as of `inject`; by default all that differ, the output head too.
        exclude: Patterns of layers to leave out.
        dtype: The dtype of the adapter's tensors; by default that of the tuned ones.
        format: As of `Patch.save_pretrained`.
        seed: Random seed. Torch's generators are not touched.
        progress: Called with the number of bytes compared so far, and the total.

    Returns:
        The ranks, the errors, and the tensors that differ but are not in the adapter: biases and norms, shape
        mismatches, embeddings that are the output head as well, excluded layers.

    Raises:
        TargetError: A pattern matches nothing.
        AdapterError: The checkpoints do not differ in any matrix, or are of other models, or quantized, or a
            difference is not finite, or too large for the dtype; or neither rank nor energy is given.
        weights.WeightsError: A checkpoint cannot be read, or the destination cannot be written.

    Example:
        >>> reduction = adapters.extract_files("someone/model", "someone/tuned-model", "out", rank=32)
        >>> reduction.left_out
        >>> adapters.load(model, reduction.path)
    """
    if rank is None and energy is None:
        raise AdapterError("Say how large the adapter may be: by rank=, or by the energy= that it has to keep.")
    check_size(rank, energy)
    before, after = Checkpoint.open(base), Checkpoint.open(tuned)
    if not before.infos.keys() & after.infos.keys():
        raise AdapterError(f"{base} and {tuned} have no tensor of one name: these are no versions of one model.")
    tied = before.tied()
    generator = torch.Generator().manual_seed(seed)
    here, chosen = _selected(before, targets, exclude)
    layers: dict[str, weights.LayerWeights] = {}
    errors: dict[str, float] = {}
    left_out = dict.fromkeys(before.infos.keys() ^ after.infos.keys(), "only one of the checkpoints has it")
    for name, difference in _differences(before, after, left_out, progress):
        target = here.get(name)
        matrix = None if target is None else LoRA().matrix(target.module, target.parameter)
        if target is None or matrix is None:
            left_out[name] = "not a 2-D weight"
        elif name not in chosen:
            left_out[name] = "excluded"
        elif name in tied:
            left_out[name] = "the embedding and the output head at once, and a LoRA is for one of them"
        else:
            update = matrix.read(difference)
            branch = lora_of(target, nearest(update, rank, energy, generator), dtype or after.infos[name].dtype)
            layers[target.path] = content_of(branch)
            up, down = cast(LoRA, branch.method).factors(branch.values(update.dtype))
            size = torch.linalg.vector_norm(update)
            errors[target.path] = float(torch.linalg.vector_norm(update.sub_(up @ down)) / size)
            if not math.isfinite(errors[target.path]):
                raise AdapterError(f"{target.path} has numbers that are too large for its dtype: choose another dtype.")
    if not layers:
        why = [f"{name} ({reason})" for name, reason in sorted(left_out.items())[:5]]
        more = f" and {len(left_out) - len(why):,} more" if len(left_out) > len(why) else ""
        differ = f"only in {', '.join(why)}{more}" if left_out else "in nothing"
        raise AdapterError(f"{base} and {tuned} differ {differ}: there is nothing to extract.")
    components = tuple(part for part in before.parts if part)
    file = weights.AdapterFile(layers, base_model=str(base), components=components)
    return write_reduction(file, destination, format, errors, left_out)


def _selected(
    checkpoint: Checkpoint, targets: Patterns | None, exclude: Patterns | None
) -> tuple[dict[str, Target], set[str]]:
    """The targets of a checkpoint by the name of the tensor, and the names of those that are selected."""
    model = Skeleton(checkpoint.infos).model()
    here = {_tensor_name(target): target for target in all_targets(model)}
    if targets is None and exclude is None:
        return here, set(here)
    rules = as_rules(LoRA(), _ALL if targets is None else targets)
    return here, {_tensor_name(target) for same, _ in select(model, rules, exclude) for target in same}


def _tensor_name(target: Target) -> str:
    return f"{target.path}.weight" if target.parameter == "weight" else target.path


def _differences(
    before: Checkpoint, after: Checkpoint, left_out: dict[str, str], progress: Callable[[int, int], None] | None
) -> Iterator[tuple[str, Tensor]]:
    """The differences of two checkpoints by the name of the tensor; those that cannot be computed are left out."""
    both = [name for name in before.infos if name in after.infos]
    sizes = {name: before.infos[name].stop - before.infos[name].start for name in both}
    done = 0
    for name in both:
        done += sizes[name]
        if before.infos[name].shape != after.infos[name].shape:
            left_out[name] = "shape mismatch"
        elif (one := before.read(name)).dtype != (other := after.read(name)).dtype or not torch.equal(one, other):
            if {one.dtype, other.dtype} <= _COUNTS:
                left_out[name] = "integers"
            elif before.is_quantized(name) or after.is_quantized(name):
                raise AdapterError(f"{name} is quantized, and its numbers are codes: take its source.")
            else:
                difference = widened(other).sub_(widened(one))
                if not difference.isfinite().all():
                    raise AdapterError(f"The difference at {name} is not finite: one of the checkpoints is damaged.")
                if difference.any():
                    yield name, difference
        if progress is not None:
            progress(done, sum(sizes.values()))
