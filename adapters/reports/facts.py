"""The data of reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weights.adapter_file import Hyperparameter


@dataclass(frozen=True)
class Fit:
    """The layers of an adapter that would load into a base, and those that would not.

    Attributes:
        loads: The paths of the layers that would.
        refused: The mismatches, a sentence for each.
        unchecked: The paths of layers that only the model itself shows to load, as names and shapes do not tell.
    """

    loads: tuple[str, ...]
    refused: tuple[str, ...]
    unchecked: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """The update of one weight by an adapter, at scale 1.

    Attributes:
        path: Its path in the base; or where there is none, in the first file that has it with dots.
        method: The key of the method.
        hyperparameters: The hyperparameters of the method.
        parameters: The number of its parameters in the file.
        shape: The shape of the matrix, `(outputs, inputs)`, with the experts in front for a stack.
        norm: The Frobenius norm of the update, `‖D‖`.
        weight_norm: The norm of the weight in the base, `‖W‖`.
        relative: `‖D‖ / ‖W‖`.
        singular_values: The singular values of the update in descending order; of a large full matrix the first 64.
        effective_rank: `exp` of the entropy of the singular values by their sum (Roy and Vetterli, 2007).
        stable_rank: `‖D‖² / σ₁²` (Rudelson and Vershynin, 2007).
        note: The reason why there are no numbers, where there are none.
    """

    path: str
    method: str
    hyperparameters: Mapping[str, Hyperparameter]
    parameters: int
    shape: tuple[int, ...] | None = None
    norm: float | None = None
    weight_norm: float | None = None
    relative: float | None = None
    singular_values: tuple[float, ...] = ()
    effective_rank: float | None = None
    stable_rank: float | None = None
    note: str = ""


@dataclass(frozen=True)
class AdapterReport:
    """The facts on one adapter.

    Attributes:
        name: Its name in the report.
        source: The file, folder or repository.
        format: The name of its format.
        base_model: The base model that it says it is for.
        task: The task that it says it is for.
        parameters: The number of its parameters, with those that layers share once.
        bytes: Their size in memory.
        dtypes: The number of parameters of each dtype.
        metadata: The metadata of the file.
        layers: Its layers, in natural order of their paths.
        fit: The layers that would load, where there is a base.
    """

    name: str
    source: str
    format: str | None
    base_model: str | None
    task: str | None
    parameters: int
    bytes: int
    dtypes: Mapping[str, int]
    metadata: Mapping[str, str]
    layers: tuple[Layer, ...]
    fit: Fit | None = None


@dataclass(frozen=True)
class LayerOverlap:
    """The overlap of two adapters at one weight.

    Attributes:
        path: Its path.
        cosine: `⟨D₁, D₂⟩ / (‖D₁‖ ‖D₂‖)`, from -1 for opposite updates to 1 for the same ones.
        subspace: The similarity of the subspaces of their leading left singular vectors, at most 16, from 0 to 1: φ of
            section 7.2 of LoRA's paper (arXiv:2106.09685).
        chance: Its mean for random subspaces.
    """

    path: str
    cosine: float
    subspace: float
    chance: float


@dataclass(frozen=True)
class Overlap:
    """The overlap of two adapters.

    Attributes:
        a: The name of the first.
        b: The name of the second.
        cosine: The cosine of all their updates, taken as one vector each; None where one of them is zero.
        layers: The weights that both change.
    """

    a: str
    b: str
    cosine: float | None
    layers: tuple[LayerOverlap, ...]


@dataclass(frozen=True)
class Facts:
    """The facts on adapters.

    Attributes:
        base: The source of the base model, if there is one.
        adapters: One entry for each adapter.
        overlaps: One entry for each pair of adapters.
        untouched: The shapes of the matrices in the base that no adapter changes, by the paths of their layers.
    """

    base: str | None
    adapters: tuple[AdapterReport, ...]
    overlaps: tuple[Overlap, ...] = ()
    untouched: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
