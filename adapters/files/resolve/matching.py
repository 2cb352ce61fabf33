"""The weights that a name in an adapter file means."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic

import weights
from adapters.files.resolve.counted import counted_paths
from adapters.files.resolve.path_index import PathIndex, W, flat
from weights.families import component_names


@dataclass(frozen=True)
class Names(Generic[W]):
    """The names in an adapter file, looked up in the path index of a base.

    A flattened name does not say which `_` was a `.`. So it is the paths of the base that are flattened and compared.
    """

    index: PathIndex[W]
    file: weights.AdapterFile

    def at(self, name: str) -> Sequence[W]:
        """The weights with a name: none, one, or several that a flattened name may mean."""
        known = self.index.by_path(self.file.flattened)
        spellings = self._counted.get(name, ()) if self.file.counted else self._spellings(name)
        return next((known[spelling] for spelling in spellings if spelling in known), ())

    def sibling(self, name: str, path: str) -> str:
        """The name that the file would have for another path of the same component."""
        component, _ = self.file.component_of(name)
        return ".".join(filter(None, (component, flat(path) if self.file.flattened else path)))

    def _spellings(self, name: str) -> Sequence[str]:
        """Paths that a name may have in the base: with its component, in a base of several models, or without."""
        component, inside = self.file.component_of(name)
        others = [f"{other}.{inside}" for other in component_names(component)]
        names = [name, *others, inside, *self.file.aliases.get(name, ()), *self._around(inside)]
        return [flat(name) for name in names] if self.file.flattened else names

    def _around(self, path: str) -> Sequence[str]:
        """The path in a checkpoint that has one module more around all others than the model, or one less.

        A checkpoint of transformers may be of a model with a head or without: `bert.encoder.layer.0` or
        `encoder.layer.0`.
        """
        firsts = self.index.first_names
        first, _, rest = path.partition(".")
        if not firsts or first in firsts:
            return ()
        known = self.index.by_path(flattened=False)
        found = [other for other in (rest, *(f"{first}.{path}" for first in firsts)) if other in known]
        return found if len(found) == 1 else ()

    @cached_property
    def _counted(self) -> dict[str, tuple[str]]:
        return counted_paths(self.index.weights, self.file)
