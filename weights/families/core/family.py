"""A family of models: everything that files and models of it call by different names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from weights.discovery import stated
from weights.families.core.table import Table


@dataclass(frozen=True)
class Architecture:
    """A language model in llama.cpp's GGUF files.

    Attributes:
        interleaved: Whether the two outputs of q and k that a rotary embedding turns together lie side by side in the
            file, where transformers has them half a head apart.
        own: Ends of the names that transformers gives layers for which most models have other names.
    """

    interleaved: bool = False
    own: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        tables: The names of layers in original checkpoints, and in diffusers or transformers. Of several tables with a
            name, the first counts of which the model has all layers.
        components: For a component by the name that files give it, the names that it has in pipelines.
        classes: For a class of modules, its names in other versions of diffusers and transformers.
        heads: Ends of the names of classes with an output head that may share the tensor of the embedding.
        architectures: The language models in GGUF files, by the name of their architecture there.
    """

    tables: tuple[Table, ...] = ()
    components: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    architectures: Mapping[str, Architecture] = field(default_factory=dict)


@cache
def families() -> tuple[Family, ...]:
    """Every family, found by discovery."""
    return tuple(family for some in stated("weights.families", "FAMILY", Family).values() for family in some)


@cache
def component_names(component: str) -> tuple[str, ...]:
    """The other names that a component may have in a pipeline, the likeliest first.

    Example:
        >>> component_names("clip_g")
        ('text_encoder_2',)
    """
    return tuple(dict.fromkeys(name for family in families() for name in family.components.get(component, ())))


@cache
def class_names(name: str) -> tuple[str, ...]:
    """A class of modules by all the names that it has had."""
    return (name, *(other for family in families() for other in family.classes.get(name, ())))


@cache
def head_classes() -> tuple[str, ...]:
    """Ends of the names of classes with an output head that may share the tensor of the embedding."""
    return tuple(end for family in families() for end in family.heads)


@cache
def architectures() -> Mapping[str, Architecture]:
    """The language models in GGUF files of which the order of the weights is known."""
    return {name: one for family in families() for name, one in family.architectures.items()}
