"""The layout of a method in PEFT's files: its type and settings in the JSON file, and the names of its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from torch import Tensor

from weights.adapter_file import AdapterFile, Hyperparameter, LayerWeights
from weights.discovery import stated

Settings = Mapping[str, Any]
PREFIX = "base_model.model."
RANK_AND_ALPHA_PATTERNS = {"rank": "rank_pattern", "alpha": "alpha_pattern"}


@dataclass(frozen=True)
class PeftLayout:
    """The layout of one method in PEFT's files.

    Attributes:
        method: The key of the method.
        type: PEFT's name for it, the `peft_type`.
        settings: For each hyperparameter, its name in the JSON file and PEFT's default.
        patterns: For a hyperparameter that may differ between layers, the setting that holds the patterns.
        pattern: The pattern for a layer and, if possible, no other, as PEFT matches those of this method.
        tensors: For each tensor, the end of its name in the file.
        aliases: Other ends of names that are read, and the tensor that each stands for.
        optional: Tensors that a layer may lack.
        pairs: Optional tensors that come in twos.
        shared: For each tensor that all layers share, its whole name in the file.
        shared_if: The setting that says whether those are in the file, by default true; None where they always are.
        whole_model: Whether there is one adapter for the whole model: its tensors have no path in their names.
        fixed: Settings that have to have one of these values, the first of which is written.
        said: Settings among the fixed ones that a file of this method always has, since PEFT's default is another
            method of the same type.
        parameters: Whether its tensors are parameters of the layers, each by its own path, rather than adapters.
        biases: Whether PEFT saves biases of the base model beside it.
        tokens: Whether PEFT saves rows of embeddings beside it.
        inert: Settings that do not change what the saved tensors compute.
        read: Settings that only `of_layer` reads, each with a check of its value.
        check: Returns the problem of a layer that has all its tensors, or None.
        of_layer: Returns further hyperparameters of a layer, by the settings, its path and its tensors.
        of_file: Returns further settings for an adapter.
        written: Returns a tensor in the shape that PEFT gives it, by its name.
    """

    method: str
    type: str
    settings: Mapping[str, tuple[str, Any]]
    tensors: Mapping[str, str]
    patterns: Mapping[str, str] = field(default_factory=dict)
    # PEFT also tries a pattern on the tail of a longer path; `^` keeps it to the whole path.
    pattern: Callable[[str], str] = lambda path: f"^{re.escape(path)}"
    aliases: Mapping[str, str] = field(default_factory=dict)
    optional: frozenset[str] = frozenset()
    pairs: tuple[tuple[str, str], ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)
    shared_if: str | None = None
    whole_model: bool = False
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    said: frozenset[str] = frozenset()
    parameters: bool = False
    biases: bool = False
    tokens: bool = False
    inert: frozenset[str] = frozenset()
    read: Mapping[str, Callable[[Any], bool]] = field(default_factory=dict)
    check: Callable[[LayerWeights], str | None] = lambda layer: None
    of_layer: Callable[[Settings, str, Mapping[str, Tensor]], Mapping[str, Hyperparameter]] = lambda *_: {}
    of_file: Callable[[AdapterFile], Settings] = lambda adapter: {}
    written: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor

    @property
    def prefix(self) -> str:
        """The start of the names of a layer's tensors in the file."""
        return "base_model." if self.whole_model else PREFIX

    def key(self, path: str, name: str) -> str:
        """The name of a layer's tensor in the file."""
        if self.whole_model:
            return self.tensors[name]
        if self.parameters and name != "weight":
            path = path.removesuffix(f".{name}")
        return f"{self.prefix}{path}.{self.tensors[name]}"

    @cached_property
    def ends(self) -> Mapping[str, str]:
        """The tensor that each end of a name stands for, the longest end first."""
        ends = {**{end: name for name, end in self.tensors.items()}, **self.aliases}
        return dict(sorted(ends.items(), key=lambda item: -len(item[0])))

    def absent(self, tensors: Mapping[str, Tensor]) -> list[str]:
        """The tensors that a layer lacks."""
        required = [name for name in self.tensors if name not in self.optional]
        for pair in self.pairs:
            required += pair if any(name in tensors for name in pair) else ()
        return [name for name in required if name not in tensors]


@cache
def peft_layouts() -> Mapping[str, PeftLayout]:
    """The layouts of all methods that PEFT's files can hold, by the method's key."""
    layouts = [layout for some in stated("weights.methods", "PEFT", PeftLayout).values() for layout in some]
    return {layout.method: layout for layout in layouts}


def rank_of(layer: LayerWeights) -> int:
    """The rank that the hyperparameters of a layer say, 0 for none."""
    rank = layer.hyperparameters.get("rank")
    return rank if isinstance(rank, int) else 0
