"""`Checkpoint`, the tensors of one model or of all models of a pipeline, by one name each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from os import PathLike
from types import SimpleNamespace
from typing import Any

from torch import Tensor

import weights
from adapters.files.resolve.path_index import CheckpointWeight, PathIndex, checkpoint_index
from adapters.layers.dtypes import is_narrow
from weights.disk.header import TensorInfo
from weights.families import head_classes
from weights.tensors.open import read_settings


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, with the name of their model in front where they are of a pipeline.

    Attributes:
        source: A file, a folder, or a place on the Hub.
        parts: The tensors of each model by its name, which is empty for a model by itself.
    """

    source: str | PathLike[str]
    parts: Mapping[str, weights.TensorFiles]

    @classmethod
    def open(cls, source: str | PathLike[str]) -> Checkpoint:
        """Open a file, a folder or a repository on the Hub, and read the headers."""
        return cls(source, weights.open_parts(source))

    @cached_property
    def infos(self) -> Mapping[str, TensorInfo]:
        """The type and the shape of each tensor."""
        return {name: self.parts[part].infos[own] for name, (part, own) in self._places.items()}

    @cached_property
    def settings(self) -> Mapping[str, Mapping[str, Any]]:
        """The content of `config.json` by the name of the model."""
        return read_settings(self.source)

    @cached_property
    def index(self) -> PathIndex[CheckpointWeight]:
        """The weights by path, for the names in adapter files."""
        return checkpoint_index(self.infos, SimpleNamespace(**_of_text(self.settings.get("", {}))))

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        part, own = self._places[name]
        return self.parts[part][own]

    def is_quantized(self, name: str) -> bool:
        """Whether the numbers of a tensor are codes rather than the weight itself."""
        dtype, scale = self.infos[name].dtype, f"{name.rpartition('.')[0]}.scale_weight"
        return not dtype.is_floating_point or (
            is_narrow(dtype) and any(other.startswith(f"{name}_scale") or other == scale for other in self.infos)
        )

    def tied(self) -> set[str]:
        """The tensors that are two weights of their model: the embedding and the head of a language model."""
        tied: set[str] = set()
        for part, settings in self.settings.items():
            text = _of_text(settings)
            rows, says = text.get("vocab_size"), {**text, **settings}.get("tie_word_embeddings")
            infos = self.parts[part].infos
            large = {name for name, info in infos.items() if len(info.shape) == 2 and info.shape[0] == rows}
            headed = any(str(name).endswith(head_classes()) for name in settings.get("architectures") or ())
            if headed and (says or (says is None and len(large) == 1)):
                tied |= {f"{part}.{name}".removeprefix(".") for name in large}
        return tied

    @cached_property
    def _places(self) -> Mapping[str, tuple[str, str]]:
        """The model of each tensor, and the name in it."""
        return {
            f"{part}.{own}".removeprefix("."): (part, own) for part, tensors in self.parts.items() for own in tensors
        }


def _of_text(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a language model, which may be a part of another one."""
    inside = settings.get("text_config")
    return inside if isinstance(inside, dict) else settings
