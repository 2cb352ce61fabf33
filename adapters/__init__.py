"""The surgery: adapters for any PyTorch model, injected, toggled, weighed, merged and ejected without a trace.

Example:
    >>> import adapters
    >>> style = adapters.inject(model, adapters.LoRA(rank=16), targets="**.attn.*", name="style")
    >>> style.scale = 0.5
    >>> with adapters.use(model):  # none: the base model
    ...     model(x)
    >>> style.eject()
"""

from importlib import import_module
from typing import Any

# Public names by module, each imported at first use: the command, which lives in this package, starts without torch.
# Any other name is that of a method. `__init__.pyi`, which `make docs` writes, tells type checkers and editors of all.
_PUBLIC = {
    "adapter": "Adapter",
    "errors": (
        "AdapterError BudgetError HyperparameterError LayerMismatchError PatchNameError PatchStateError RowsError"
        " TargetError"
    ),
    "files.combine": "combine_files resize_file",
    "files.extract": "extract_files",
    "files.library": "Library",
    "files.load": "load",
    "files.merge": "merge_files",
    "files.reduction": "Reduction",
    "methods": "METHODS register",
    "methods.core.method": "Branch Method",
    "methods.core.spec": "WeightSpec",
    "methods.core.tensors": "Tensors",
    "patch.combine": "combine",
    "patch.distributed": "parallel_plan",
    "patch.initialize": "initialize",
    "patch.inject": "inject",
    "patch.patch": "Patch patches",
    "patch.rank_allocation": "RankAllocator",
    "patch.use": "use",
    "reports.report": "Report report",
    "runtime.adapted_layer": "AdaptedLayer",
}
_MODULES = {name: module for module, names in _PUBLIC.items() for name in names.split()}
_FORMER = {"Adapted": "AdaptedLayer", "Site": "WeightSpec"}


def __getattr__(name: str) -> Any:
    if name == "__all__":
        return [name for name in __dir__() if not name.startswith("_")]
    known = _FORMER.get(name, name)
    value = (
        None
        if name.startswith("_")
        else getattr(import_module(f"adapters.{_MODULES.get(known, 'methods')}"), known, None)
    )
    if value is None:
        raise AttributeError(f"module 'adapters' has no attribute {name!r}", name=name)
    return globals().setdefault(name, value)


def __dir__() -> list[str]:
    return sorted({*_MODULES, *import_module("adapters.methods").__dir__()})
