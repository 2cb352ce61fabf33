"""Adapter files with the paths of a base model in place of their own names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import weights
from adapters.errors import refuse
from adapters.files.resolve.path_index import CheckpointWeight, PathIndex
from adapters.files.resolve.resolved import ResolvedAdapter, other_base, resolve


def with_base_paths(
    index: PathIndex[CheckpointWeight], parts: Collection[str], file: weights.AdapterFile
) -> weights.AdapterFile:
    """An adapter file with the dotted paths that its layers have in a base model.

    Args:
        index: The weights of the base model.
        parts: The models of which the base is made, by name; `""` for one model by itself. Then layers keep the
            component that they have in the file.
        file: An adapter with any names: flattened, of an original model, or of other components.

    Raises:
        LayerMismatchError: It has layers that the base model does not have; the message lists them.
    """
    resolved = resolve(index, file)
    refuse(other_base(file), resolved.mismatches)
    by_path = {_path(resolved, layer.weight, layer.name, parts): layer.content for layer in resolved.layers}
    whole = {} if resolved.whole_model is None else {"": resolved.whole_model}
    known = file.components if "" in parts else tuple(parts)
    used = {path.partition(".")[0] for path in by_path}
    return replace(
        resolved.file,
        layers={**whole, **by_path},
        flattened=False,
        components=tuple(name for name in known if name in used),
        aliases={},
    )


def _path(
    resolved: ResolvedAdapter[CheckpointWeight], weight: CheckpointWeight, name: str, parts: Collection[str]
) -> str:
    component = resolved.file.component_of(name)[0] if "" in parts else ""
    return f"{component}.{weight.path}" if component else weight.path
