"""The data of reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from weights.adapter_file import Hyperparameter


@dataclass(frozen=True)
class Fit:
    """What of an adapter would load into a base.

    Attributes:
        loads: The paths of the layers that would.
        refused: What would not, each in a sentence.
        unchecked: The paths for which names and shapes do not tell, only the model itself.
    """

    loads: tuple[str, ...]
    refused: tuple[str, ...]
    unchecked: tuple[str, ...]


@dataclass(frozen=True)
class Layer:
    """What an adapter does to one weight, at scale 1.

    Attributes:
        path: Its path in the base; or where there is none, in the first file that has it with dots.
        method: The key of the method.
        hyperparameters: Those of the method.
        parameters: How many numbers the file has for it.
        shape: Of the matrix, `(outputs, inputs)`, with the experts in front for a stack.
        norm: The Frobenius norm of the update, `‖D‖`.
        weight_norm: That of the weight in the base, `‖W‖`.
        relative: `‖D‖ / ‖W‖`.
        singular_values: Those of the update from the largest on; of a large full matrix the first 64.
        effective_rank: `exp` of the entropy of the singular values by their sum (Roy and Vetterli, 2007).
        stable_rank: `‖D‖² / σ₁²` (Rudelson and Vershynin, 2007).
        note: Why there are no numbers, where there are none.
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
    """What one adapter is and does.

    Attributes:
        name: What it is called in the report.
        source: Where it is from.
        format: The name of its format.
        base_model: The base model that it says it is for.
        task: The task that it says it is for.
        parameters: How many numbers it has, with those that layers share once.
        bytes: How much memory these take.
        dtypes: How many there are of each type.
        metadata: What it says of itself.
        layers: Its layers, in the order of their names and the numbers in these.
        fit: What of it would load, where there is a base.
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
    """What two adapters have in common at one weight.

    Attributes:
        path: Its path.
        cosine: `⟨D₁, D₂⟩ / (‖D₁‖ ‖D₂‖)`, from -1 for opposite updates to 1 for the same ones.
        subspace: How much of the leading directions that they write into is the same, from 0 to 1: φ of LoRA's section
            7.2 (arXiv:2106.09685), for at most 16 left singular vectors.
        chance: What that is on average for random directions.
    """

    path: str
    cosine: float
    subspace: float
    chance: float


@dataclass(frozen=True)
class Overlap:
    """What two adapters have in common.

    Attributes:
        a: The name of the first.
        b: The name of the second.
        cosine: That of all their updates, taken as one vector each; None where one of them is zero.
        layers: The weights that both change.
    """

    a: str
    b: str
    cosine: float | None
    layers: tuple[LayerOverlap, ...]


@dataclass(frozen=True)
class Facts:
    """What adapters are and do.

    Attributes:
        base: Where the base model is from, if there is one.
        adapters: One entry for each adapter.
        overlaps: One entry for each pair of adapters.
        untouched: The shapes of those matrices in the base that none of them changes, by the paths of their layers.
    """

    base: str | None
    adapters: tuple[AdapterReport, ...]
    overlaps: tuple[Overlap, ...] = ()
    untouched: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
