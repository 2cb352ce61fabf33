"""Names of an original model, for a base that has its layers by other names or in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate

import weights
from adapters.files.resolve.matching import Names
from adapters.files.resolve.path_index import W
from weights.families import Part, translate
from weights.methods.core.rows import split_rows, take_rows


class UnsplittableError(ValueError):
    """The tensors of a fused layer that cannot be cut into its parts; the message says why."""


def in_parts(names: Names[W], name: str, content: weights.LayerWeights) -> dict[str, weights.LayerWeights]:
    """The tensors for a layer, by the names of the layers that the base has in its place.

    These are one under its own name, where the base has that, or does not have the layer at all.

    Raises:
        UnsplittableError: The tensors cannot be cut into the parts.
    """
    parts = _parts(names, name)
    blocks = [part for part in parts if part.block]
    if not blocks:
        return {name: content}
    try:
        return _cut(names, name, content, blocks)
    except ValueError as problem:
        paths = " and ".join(dict.fromkeys(part.path for part in blocks))
        raise UnsplittableError(f"{name}, which is {paths} in the model, has {problem}") from None


def _parts(names: Names[W], name: str) -> tuple[Part, ...]:
    """The parts of a layer under other names; nothing if the base has it under its own, or does not have it."""
    if not _rows(names, name):
        for parts in translate(names.file.component_of(name)[1], flattened=names.file.flattened):
            if all(_rows(names, names.sibling(name, part.path)) for part in parts):
                return parts
    return ()


def _cut(
    names: Names[W], name: str, content: weights.LayerWeights, parts: Sequence[Part]
) -> dict[str, weights.LayerWeights]:
    """The tensors for a layer by the names of its parts; raises a ValueError where they cannot be cut."""
    paths = [names.sibling(name, part.path) for part in parts]
    if parts == [Part(parts[0].path)]:
        return {paths[0]: _with_parameter_of(names, paths[0], name, content)}
    sizes = [_rows(names, path) // part.blocks for path, part in zip(paths, parts, strict=True)]
    if len({*paths}) == len(paths):
        return dict(zip(paths, split_rows(content, sizes), strict=True))
    # They are blocks of a single layer, in another order.
    ends = list(accumulate(sizes))
    blocks = {part.block: range(end - size, end) for part, size, end in zip(parts, sizes, ends, strict=True)}
    return {paths[0]: take_rows(content, [blocks[number] for number in sorted(blocks)], ends[-1])}


def _with_parameter_of(names: Names[W], to: str, name: str, content: weights.LayerWeights) -> weights.LayerWeights:
    """A copied parameter under the name that it has in the base."""
    if content.method != "copy":
        return content
    own = {name.rpartition(".")[2]: names.at(to)[-1].parameter}
    return replace(content, tensors={own.get(key, key): tensor for key, tensor in content.tensors.items()})


def _rows(names: Names[W], name: str) -> int:
    """The number of outputs of the layer with a name; 0 where there is none, or no weight in it."""
    at = names.at(name)
    return at[-1].rows if at else 0
