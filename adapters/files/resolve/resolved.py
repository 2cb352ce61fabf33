"""`ResolvedAdapter`, an adapter with the paths of a model or a checkpoint, and `resolve`, which finds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, NamedTuple

import weights
from adapters.errors import refuse
from adapters.files.resolve.matching import Names
from adapters.files.resolve.original_names import UnsplittableError, in_parts
from adapters.files.resolve.path_index import PathIndex, W
from adapters.files.resolve.rotary import in_halves


class ResolvedLayer(NamedTuple, Generic[W]):
    """A weight of the base, and the adapter of it.

    Attributes:
        weight: The weight.
        content: The method and its tensors.
        name: The name in the file.
    """

    weight: W
    content: weights.LayerWeights
    name: str


@dataclass(frozen=True)
class ResolvedAdapter(Generic[W]):
    """An adapter with the paths of a base: of a model or a checkpoint.

    Attributes:
        file: The adapter in its own names, with the tensors that layers share, and those for no layer.
        layers: In the order of the base.
        missing: The layers that the base does not have, by their names in the file.
        problems: A sentence for each name that is ambiguous, and for each layer that cannot be cut into those that the
            base has in its place.
        whole_model: The method and tensors for the whole model, which no path names.
    """

    file: weights.AdapterFile
    layers: Sequence[ResolvedLayer[W]]
    missing: Mapping[str, weights.LayerWeights] = field(default_factory=dict)
    problems: Sequence[str] = ()
    whole_model: weights.LayerWeights | None = None

    @property
    def mismatches(self) -> list[str]:
        """The problems, and a sentence for each layer that the base does not have."""
        return [*self.problems, *(f"there is no layer {name}" for name in sorted(self.missing))]


def resolve(index: PathIndex[W], file: weights.AdapterFile) -> ResolvedAdapter[W]:
    """Find the weights of a base that the layers of an adapter file are for.

    A layer of an original model that the base has in parts is cut into these.

    Raises:
        LayerMismatchError: The file orders the outputs of attention by heads, of which the base does not say the size.
    """
    file = in_halves(index.config, file)
    names = Names(index, file)
    found: dict[W, list[tuple[str, weights.LayerWeights]]] = {}
    missing: dict[str, weights.LayerWeights] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for name, content in file.layers.items():
        if not name:
            continue
        try:
            parts = in_parts(names, name, content)
        except UnsplittableError as problem:
            problems.append(str(problem))
            continue
        for to, part in parts.items():
            if to in sources:
                problems.append(f"{sources[to]} and {name} are both for {to}")
                continue
            sources[to] = name
            at = names.at(to)
            if len(at) > 1:
                problems.append(f"{to} may be {' or '.join(weight.path for weight in at)}")
            elif at:
                found.setdefault(at[0], []).append((to, part))
            else:
                missing[to] = part
    for weight, named in found.items():
        if len(named) > 1:
            problems.append(f"{' and '.join(name for name, _ in named)} are both for {weight.path}")
    layers = [ResolvedLayer(weight, part, name) for weight in index.weights for name, part in found.get(weight, ())[:1]]
    return ResolvedAdapter(file, layers, missing, problems, file.layers.get(""))


def resolve_all(index: PathIndex[W], file: weights.AdapterFile) -> ResolvedAdapter[W]:
    """Resolve an adapter of which a base has every layer.

    Raises:
        LayerMismatchError: The base does not have a layer of the adapter, or that is for the whole model; the message
            lists them.
    """
    resolved = resolve(index, file)
    whole = [] if resolved.whole_model is None else [f"its {resolved.whole_model.method} is for the whole model"]
    refuse(other_base(file), [*resolved.mismatches, *whole])
    return resolved


def other_base(file: weights.AdapterFile) -> str:
    """The first words of the error for an adapter with layers that a base does not have."""
    words = "The adapter is for another base model"
    if len(file.components) > 1:
        words += f", or for several: choose one out of {', '.join(file.components)}"
    return words
