"""Formats that keep all of an adapter in one safetensors file, as tensors named `<layer>.<end>`.

They differ in how they name layers; the ends are in `key_ends`. A layer's `alpha` is a tensor beside the others, and
stands for the rank where it is missing. The method of a layer shows in the tensors it has: a layout of
`weights.methods`. OneTrainer keeps the embeddings of new tokens in the same file, named
`bundle_emb.<token>.<text encoder>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from functools import cache

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.formats.common.format import refuse
from weights.formats.common.key_ends import ALPHA, LARGER, biases, split
from weights.formats.common.probe import Probe
from weights.methods.core.factors import missing, partner
from weights.methods.core.lycoris import layouts_with, lycoris_layouts

_EMBEDDING = "bundle_emb."


def read(
    probe: Probe,
    where: Callable[[str], str | None],
    name: str,
    *,
    components: Collection[str] = (),
    flattened: bool = False,
    own: Collection[str] = (),
) -> AdapterFile:
    """Read a file.

    Args:
        probe: The file.
        where: Returns the path of a layer, with the component in front, by its name in the keys; None where that is
            no layer.
        name: The name of the format, for messages.
        components: The components that a path may begin with.
        flattened: Whether the names of layers are flattened.
        own: Keys that the format reads by itself.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists the problems.
    """
    file = probe.open()
    others = {key: file[key] for key in file if is_other(key)}
    named: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    bias_ends = biases()
    for key in file:
        if key in own or key in others:
            continue
        stem, end = split(key) or ("", "")
        path = where(stem) if stem else None
        if path is None or (end == "weight" and not flattened and f"{stem}.on_input" not in file):
            problems.append(f"the key {key!r} is not expected")
            continue
        if end in bias_ends:  # A bias is a layer of its own here.
            path, end = f"{path}{'_' if flattened else '.'}bias", bias_ends[end]
        if named.setdefault(path, {}).setdefault(end, key) != key:
            problems.append(f"{key!r} and {named[path][end]!r} are the same tensor of a layer")
    layers: dict[str, LayerWeights] = {}
    for path, ends in named.items():
        try:
            layers[path] = _layer({end: file[key] for end, key in ends.items()})
        except ValueError as error:
            problems.append(_incomplete(ends) or f"layer {path!r} has {error}")
    refuse(probe.path, name, problems)
    parts = {path.partition(".")[0] for path in layers if "." in path}.intersection(components)
    return AdapterFile(
        layers, metadata=file.metadata, flattened=flattened, components=tuple(sorted(parts)), others=others
    )


def is_other(key: str) -> bool:
    """Whether a key is for no layer, but for the embedding of a new token."""
    return key.startswith(_EMBEDDING)


@cache
def _complete() -> frozenset[frozenset[str]]:
    """The ends that the tensors of a layer may have together."""
    return frozenset(frozenset(map(layout.end, names)) for layout in lycoris_layouts() for names in layout.sets)


def _incomplete(ends: Mapping[str, str]) -> str | None:
    """The problem of a layer that lacks tensors of the only method it may be of.

    Args:
        ends: The key of each tensor, by its end in LyCORIS's spelling.
    """
    found = ends.keys() - {ALPHA}
    if not found or found in _complete() or LARGER in found:
        return None
    larger = sorted((wanted for wanted in _complete() if found < wanted), key=len)
    if not larger or (len(larger) > 1 and len(larger[0]) == len(larger[1])):
        return None
    keys = {split(other): key for key in ends.values() if (other := partner(key)) is not None}
    first = min(found)
    stem, _ = split(ends[first]) or ("", "")
    absent = sorted(larger[0] - found)
    paired = [keys[stem, end] for end in absent if (stem, end) in keys]
    key = paired[0] if paired else ends[first]
    return missing(key, *(partner(key) or "" if (stem, end) in keys else f"{stem}.{end}" for end in absent))


def _layer(found: Mapping[str, Tensor]) -> LayerWeights:
    """A layer by its tensors, given by their ends in LyCORIS's spelling; raises a ValueError with the problem."""
    if LARGER in found:
        raise ValueError(f"a {LARGER}: it makes the weight larger, which an adapter of a layer cannot")
    named = {end: tensor for end, tensor in found.items() if end != ALPHA}
    for layout in layouts_with(frozenset(named)):
        tensors = layout.named(named)
        if tensors is not None and (layout.has_alpha or ALPHA not in found):
            break
    else:
        raise ValueError(f"{', '.join(sorted(found))}, which together are of no known method")
    layout.check(tensors)
    hyperparameters, tensors = layout.read(tensors, _alpha(found.get(ALPHA)))
    return LayerWeights(layout.method, hyperparameters, tensors)


def _alpha(alpha: Tensor | None) -> float | None:
    if alpha is None:
        return None
    if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha.item()):
        raise ValueError("an alpha that is not a number")
    return float(alpha.item())
