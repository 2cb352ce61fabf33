"""The surgery: adapters for any PyTorch model, injected, toggled, weighed, merged and ejected without a trace.

Example:
    >>> import adapters
    >>> style = adapters.inject(model, adapters.LoRA(rank=16), targets="**.attn.*", name="style")
    >>> style.scale = 0.5
    >>> with adapters.use(model):  # none: the base model
    ...     model(x)
    >>> style.eject()
"""

import sys
from collections.abc import Iterable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # The same as the table below, for type checkers and editors.
    from adapters.activation import use as use
    from adapters.adapted import Adapted as Adapted
    from adapters.adapter import Adapter as Adapter
    from adapters.allocator import RankAllocator as RankAllocator
    from adapters.branch import Branch as Branch
    from adapters.branch import Tensors as Tensors
    from adapters.catalogue import methods as methods
    from adapters.combine import combine as combine
    from adapters.combine_files import combine_files as combine_files
    from adapters.combine_files import resize_file as resize_file
    from adapters.disk import merge_files as merge_files
    from adapters.errors import AdapterError as AdapterError
    from adapters.errors import BudgetError as BudgetError
    from adapters.errors import LayerMismatchError as LayerMismatchError
    from adapters.errors import PatchNameError as PatchNameError
    from adapters.errors import PatchStateError as PatchStateError
    from adapters.errors import RowsError as RowsError
    from adapters.errors import TargetError as TargetError
    from adapters.extract import Reduction as Reduction
    from adapters.extract import extract_files as extract_files
    from adapters.initialize import initialize as initialize
    from adapters.library import Library as Library
    from adapters.loading import load as load
    from adapters.method import Method as Method
    from adapters.method import Site as Site
    from adapters.methods import *
    from adapters.parallel import parallel_plan as parallel_plan
    from adapters.patch import Patch as Patch
    from adapters.patch import inject as inject
    from adapters.patch import patches as patches
    from adapters.report import Report as Report
    from adapters.report import report as report

# What is public, by the module that has it. A module is imported when something of it is asked for: this package also
# holds the command, whose help, completion and `doctor` are there at once, or where torch is not.
_PUBLIC = {
    "activation": "use",
    "adapted": "Adapted",
    "adapter": "Adapter",
    "allocator": "RankAllocator",
    "branch": "Branch Tensors",
    "catalogue": "methods",
    "combine": "combine",
    "combine_files": "combine_files resize_file",
    "disk": "merge_files",
    "errors": "AdapterError BudgetError LayerMismatchError PatchNameError PatchStateError RowsError TargetError",
    "extract": "Reduction extract_files",
    "initialize": "initialize",
    "library": "Library",
    "loading": "load",
    "method": "Method Site",
    "methods": "METHODS AdaLoRA BOFT Bat BitFit Bottleneck C3A Copy DeLoRA DiagOFT DoHa DoKr DoRA FourierFT Full GLoRA "
    "GraLoRA HRA HiRA IA3 LoHa LoKr LoRA LycorisGLoRA MiSS NormTuning OFT OutputBOFT PrefixTuning PromptTuning "
    "RandLoRA RoAd SHiRA TrainableTokens VBLoRA VeRA register",
    "parallel": "parallel_plan",
    "patch": "Patch inject patches",
    "report": "Report report",
}
_HOMES = {name: module for module, names in _PUBLIC.items() for name in names.split()}

__all__ = [*_HOMES]


class _Package(ModuleType):
    """This package, which gets what is public from where it is."""

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}", name=name, obj=self)
        value = getattr(import_module(f"{self.__name__}.{_HOMES[name]}"), name)
        setattr(self, name, value)
        return value

    def __setattr__(self, name: str, value: object) -> None:
        # Python puts a submodule here when it is imported. Those named `combine` and so on stay behind the functions.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __dir__(self) -> Iterable[str]:
        return sorted({*vars(self), *_HOMES})


sys.modules[__name__].__class__ = _Package
