"""Families of models: their names in files and in models, one module each, found by discovery.

A module states as `FAMILY` the names of layers in original checkpoints and in diffusers and transformers, the names of
components, and the order of rotary embeddings. A new family is one new module.
"""

from weights.families.core.family import architectures, class_names, component_names, head_classes
from weights.families.core.translate import Part, translate

__all__ = ["Part", "architectures", "class_names", "component_names", "head_classes", "translate"]
