"""What the formats share that keep all of an adapter in one safetensors file, as tensors named `<layer>.<end>`.

They differ in how they name layers; the ends are in `keys`. A layer's `alpha` is a tensor beside the others, and stands
for the rank where it is missing. Which method a layer has shows in which tensors it has: that is in `lycoris_methods`.
OneTrainer keeps the embeddings of new tokens in the same file, named `bundle_emb.<token>.<text encoder>`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.errors import FileFormatError, listed
from weights.formats.found import Found
from weights.formats.keys import ALPHA, BIASES, LARGER, split
from weights.formats.lycoris_methods import GRAMMARS

_EMBEDDING = "bundle_emb."


def read(
    found: Found,
    where: Callable[[str], str | None],
    name: str,
    *,
    components: Collection[str] = (),
    flattened: bool = False,
    own: Collection[str] = (),
) -> AdapterFile:
    """What is in a file.

    Args:
        found: The file.
        where: The path, with the component in front, of what a key calls a layer; None if that is no layer.
        name: The name of the format, for messages.
        components: The components that a path may begin with.
        flattened: Whether the names of layers are flattened.
        own: Keys that the format reads by itself.

    Raises:
        FileFormatError: The file is not sound, or uses what is not supported; the message lists what is wrong.
    """
    file = found.open()
    others = {key: file[key] for key in file if is_other(key)}
    named: dict[str, dict[str, str]] = {}
    problems: list[str] = []
    for key in file:
        if key in own or key in others:
            continue
        stem, end = split(key) or ("", "")
        path = where(stem) if stem else None
        if path is None or (end == "weight" and not flattened and f"{stem}.on_input" not in file):
            problems.append(f"the key {key!r} is not expected")
            continue
        if end in BIASES:  # A bias is a layer of its own here.
            path, end = f"{path}{'_' if flattened else '.'}bias", BIASES[end]
        if named.setdefault(path, {}).setdefault(end, key) != key:
            problems.append(f"{key!r} and {named[path][end]!r} are the same tensor of a layer")
    layers: dict[str, LayerWeights] = {}
    for path, ends in named.items():
        try:
            layers[path] = _layer({end: file[key] for end, key in ends.items()})
        except ValueError as problem:
            problems.append(f"layer {path!r} has {problem}")
    refuse(found.path, name, problems)
    parts = {path.partition(".")[0] for path in layers if "." in path}.intersection(components)
    return AdapterFile(
        layers, metadata=file.metadata, flattened=flattened, components=tuple(sorted(parts)), others=others
    )


def is_other(key: str) -> bool:
    """Whether a key is for no layer, but for the embedding of a new token."""
    return key.startswith(_EMBEDDING)


def refuse(path: Path, name: str, problems: list[str]) -> None:
    """Raise one FileFormatError for all problems, if there are any."""
    if problems:
        raise FileFormatError(f"{path} does not work as a {name} file: {listed(problems)}.")


def _layer(found: Mapping[str, Tensor]) -> LayerWeights:
    """What the tensors of a layer mean, by the ends of their names; raises a ValueError that says what is wrong."""
    if LARGER in found:
        raise ValueError(f"a {LARGER}: it makes the weight larger, which an adapter of a layer cannot")
    for grammar in GRAMMARS:
        tensors = {grammar.ends.get(end, end): found[end] for end in sorted(found.keys() - {ALPHA})}
        if grammar.fits(tensors) and (grammar.has_alpha or ALPHA not in found):
            break
    else:
        raise ValueError(f"{', '.join(sorted(found))}, which is no method that is known here")
    grammar.check(tensors)
    hyperparameters, tensors = grammar.read(tensors, _alpha(found.get(ALPHA)))
    return LayerWeights(grammar.method, hyperparameters, tensors)


def _alpha(alpha: Tensor | None) -> float | None:
    if alpha is None:
        return None
    if alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(alpha.item()):
        raise ValueError("an alpha that is not a number")
    return float(alpha.item())
