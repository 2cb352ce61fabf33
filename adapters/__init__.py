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
from adapters.allocator import RankAllocator
from adapters.branch import Branch, Tensors
from adapters.catalogue import methods
from adapters.combine import combine
from adapters.disk import merge_files
from adapters.errors import (
    AdapterError,
    BudgetError,
    LayerMismatchError,
    PatchNameError,
    PatchStateError,
    RowsError,
    TargetError,
)
from adapters.initialize import initialize
from adapters.library import Library
from adapters.loading import load
from adapters.method import Method, Site
from adapters.methods import *
from adapters.methods import __all__ as _methods
from adapters.patch import Patch, inject, patches

__all__ = [
    "Adapted",
    "Adapter",
    "AdapterError",
    "Branch",
    "BudgetError",
    "LayerMismatchError",
    "Library",
    "Method",
    "Patch",
    "PatchNameError",
    "PatchStateError",
    "RankAllocator",
    "RowsError",
    "Site",
    "TargetError",
    "Tensors",
    "combine",
    "initialize",
    "inject",
    "load",
    "merge_files",
    "methods",
    "patches",
    "use",
    *_methods,
]
