"""`Reduction`, an adapter that was written to stand for something else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import cast

import weights
from adapters.methods.core.method import Branch
from adapters.patch.save import write_file


@dataclass(frozen=True)
class Reduction:
    """An adapter that was written to stand for something else, and its errors.

    Attributes:
        path: Where it was written.
        format: The format of the file.
        ranks: The rank at each layer, by path.
        errors: `‖B A - D‖ / ‖D‖` at each layer, in the Frobenius norm, for the update `D` that it stands for. Rounding
            to the dtype of the file is included.
        left_out: The tensors that no LoRA can hold, by name, each with the reason. They are not in the adapter.

    Example:
        >>> reduction = adapters.resize_file("style.safetensors", "smaller", rank=8)
        >>> max(reduction.errors.values())
        >>> adapters.load(model, reduction.path)
    """

    path: Path
    format: str
    ranks: dict[str, int]
    errors: dict[str, float]
    left_out: dict[str, str] = field(default_factory=dict)


def write_reduction(
    file: weights.AdapterFile,
    destination: str | PathLike[str],
    format: str | None,
    errors: Mapping[str, float],
    left_out: Mapping[str, str] | None = None,
) -> Reduction:
    """Write an adapter with known errors."""
    path = Path(destination)
    ranks = {layer: cast(int, file.layers[layer].hyperparameters["rank"]) for layer in errors}
    return Reduction(path, write_file(file, path, format), ranks, dict(errors), dict(sorted((left_out or {}).items())))


def content_of(branch: Branch) -> weights.LayerWeights:
    """The method and the tensors of a branch, for a file."""
    method, tensors = branch.method.saved(branch)
    detached = {name: tensor.detach() for name, tensor in tensors.items()}
    return weights.LayerWeights(method.key, method.hyperparameters(), detached)
