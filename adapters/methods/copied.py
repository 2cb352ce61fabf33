"""Copied modules: whole parameters are trained, and used instead of the model's own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from adapters.errors import TargetError
from adapters.methods.core.copies import ParameterCopy


@dataclass(frozen=True)
class Copy(ParameterCopy):
    """A copy of every parameter of the modules that are named, and of all below them, such as a new head.

    Buffers, such as the running means of a batch normalisation, stay those of the model: files hold them too, and do
    not fit a model that has others.

    Example:
        >>> patch = adapters.inject(model, adapters.Copy(), targets="head")
        >>> print(sorted(patch.state_dict()))
        >>> patch.save_pretrained("head")
    """

    key = "copy"
    paper = "PEFT's modules_to_save"
    formula = "C, which starts as a copy of W"
    files_have_buffers = True

    def selects(self, parameter: str) -> bool:
        return True

    def includes_descendants(self) -> bool:
        return True

    def default_targets(self, model: nn.Module) -> Callable[[str, nn.Module], bool] | None:
        raise TargetError(f"{type(self).__name__} would copy the whole model: name the modules with targets=.")
