"""The surgery: adapters for any PyTorch model, injected, toggled, weighed, merged and ejected without a trace.

Example:
    >>> import adapters
    >>> style = adapters.inject(model, adapters.LoRA(rank=16), targets="**.attn.*", name="style")
    >>> style.scale = 0.5
    >>> with adapters.use(model):  # none: the base model
    ...     model(x)
    >>> style.eject()
"""

from adapters.activation import use
from adapters.adapted import Adapted
from adapters.adapter import Adapter
from adapters.branch import Branch, Tensors
from adapters.catalogue import methods
from adapters.combine import combine
from adapters.errors import (
    AdapterError,
    LayerMismatchError,
    PatchNameError,
    PatchStateError,
    RowsError,
    TargetError,
)
from adapters.method import Method, Site
from adapters.methods import Copy, LoRA, register
from adapters.methods import BOFT, C3A, HRA, OFT, Bat, Copy, DiagOFT, LoRA, MiSS, OutputBOFT
from adapters.patch import Patch, inject, load, patches

__all__ = [
    "BOFT",
    "C3A",
    "HRA",
    "OFT",
from adapters.methods import IA3, Copy, DeLoRA, GLoRA, HiRA, LoRA, LycorisGLoRA, RoAd
from adapters.patch import Patch, inject, load, patches

__all__ = [
    "IA3",
    "Adapted",
    "Adapter",
    "AdapterError",
    "Bat",
    "Branch",
    "Copy",
    "DiagOFT",
    "DeLoRA",
    "GLoRA",
    "HiRA",
    "LayerMismatchError",
    "LoRA",
    "LycorisGLoRA",
    "Method",
    "MiSS",
    "OutputBOFT",
    "Patch",
    "PatchNameError",
    "PatchStateError",
    "RoAd",
    "RowsError",
    "Site",
    "TargetError",
    "Tensors",
    "combine",
    "inject",
    "load",
    "methods",
    "patches",
    "register",
    "use",
]
