"""Files with the names of an original model, for a model that has its layers by other names or in parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import weights
from adapters.files.resolve.matching import Places, flat, spellings
from adapters.layers.matrix import Matrix
from adapters.targets.target import Target
from weights.families.translate import Part, translate
from weights.methods.rows import split_rows, take_rows


def with_names_of(places: Places, file: weights.AdapterFile) -> tuple[weights.AdapterFile, list[str]]:
    """A file with the names of a model for those layers that it knows by the names of the original.

    Returns:
        The file, where what is for a layer that the model has in parts is cut into these, and what the model has by
        no name is as it was; and what is wrong with the layers that cannot be cut.
    """
    names = _Names(file, places)
    renamed: dict[str, weights.LayerWeights] = {}
    sources: dict[str, str] = {}
    problems: list[str] = []
    for name, content in file.layers.items():
        parts = names.parts(name)
        try:
            cut = names.cut(name, content, parts) if parts else {name: content}
        except ValueError as problem:
            paths = " and ".join(dict.fromkeys(part.path for part in parts if part.block))
            problems.append(f"{name}, which is {paths} in the model, has {problem}")
            continue
        for to, layer in cut.items():
            if to in sources:
                problems.append(f"{sources[to]} and {name} are both for {to}")
            sources[to], renamed[to] = name, layer
    return replace(file, layers=renamed), problems


@dataclass(frozen=True)
class _Names:
    """What the names in a file mean in a model."""

    file: weights.AdapterFile
    places: Places

    def parts(self, name: str) -> tuple[Part, ...]:
        """What a layer is by other names; nothing if the model has it by this one, or does not have it."""
        if not self.size(name):
            for parts in translate(self.file.component_of(name)[1], flattened=self.file.flattened):
                if all(self.size(self.beside(name, part.path)) for part in parts):
                    return parts
        return ()

    def cut(self, name: str, content: weights.LayerWeights, parts: Sequence[Part]) -> dict[str, weights.LayerWeights]:
        """What a file has for a layer, by the names of its parts; raises a ValueError where it cannot be cut."""
        parts = [part for part in parts if part.block]
        names = [self.beside(name, part.path) for part in parts]
        if parts == [Part(parts[0].path)]:
            return {names[0]: self.with_own_parameter(name, content, names[0])}
        sizes = [self.size(to) // part.blocks for to, part in zip(names, parts, strict=True)]
        if len({*names}) == len(names):
            return dict(zip(names, split_rows(content, sizes), strict=True))
        # They are blocks of a single layer, in another order.
        ends = list(accumulate(sizes))
        blocks = {part.block: range(end - size, end) for part, size, end in zip(parts, sizes, ends, strict=True)}
        return {names[0]: take_rows(content, [blocks[number] for number in sorted(blocks)], ends[-1])}

    def with_own_parameter(self, name: str, content: weights.LayerWeights, to: str) -> weights.LayerWeights:
        """A layer whose copy of a parameter goes by the name that this has in the model."""
        layer = self.layer(to)
        if content.method != "copy" or layer is None:
            return content
        own = {name.rpartition(".")[2]: layer.parameter}
        return replace(content, tensors={own.get(key, key): tensor for key, tensor in content.tensors.items()})

    def beside(self, name: str, path: str) -> str:
        """The name that the file would have for another layer of the same component."""
        component, _ = self.file.component_of(name)
        return ".".join(filter(None, (component, flat(path) if self.file.flattened else path)))

    def layer(self, name: str) -> Target | None:
        """The layer of the model that has a name."""
        known = (self.places[spelling] for spelling in spellings(name, self.file) if spelling in self.places)
        found = next(known, ())
        return found[-1] if found else None

    def size(self, name: str) -> int:
        """How many rows the layer has that has a name; 0 where there is none, or no weight in it."""
        layer = self.layer(name)
        if layer is None:
            return 0
        matrix = Matrix.of(layer.module, layer.parameter)
        if matrix is not None:
            return matrix.shape[-2]
        return len(layer.own) if layer.own is not None and layer.own.ndim else 0
