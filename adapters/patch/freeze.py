"""Freezing of the base model while a patch is injected."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import nn

from adapters.adapter import base_modules
from adapters.patch.record import PatchRecord
from adapters.runtime.adapted_layer import AdaptedLayer


def freeze_base(patch: PatchRecord, model: nn.Module) -> None:
    """Turn `requires_grad` off for the parameters of the base, and remember which ones had it."""
    patch.frozen = [parameter for parameter in _base_parameters(model).values() if parameter.requires_grad]
    for parameter in patch.frozen:
        parameter.requires_grad_(False)


def thaw_base(patch: PatchRecord, model: nn.Module, others: Collection[PatchRecord] = ()) -> None:
    """Turn `requires_grad` on again for what a patch froze, unless another one still wants it frozen: its heir."""
    frozen = {id(parameter): parameter for parameter in patch.frozen}
    for heir in others:
        if heir.freezes_base and frozen:
            base = _base_parameters(heir.bound_model or model)
            heir.frozen += [frozen.pop(key) for key in base.keys() & frozen.keys()]
    for parameter in frozen.values():
        parameter.requires_grad_(True)
    patch.frozen = []


def replace_frozen(patches: Collection[PatchRecord], replaced: Mapping[int, list[nn.Parameter]]) -> None:
    """Let patches thaw the parameters that took the place of frozen ones, given by the ids of these."""
    for patch in patches:
        patch.frozen = [new for old in patch.frozen for new in replaced.get(id(old), [old])]


def _base_parameters(model: nn.Module) -> dict[int, nn.Parameter]:
    """The parameters of the base model by id, with those that merged ones stand in for."""
    found: dict[int, nn.Parameter] = {}
    for module in base_modules(model):
        own = module.displaced() if isinstance(module, AdaptedLayer) else module._parameters.values()
        found.update((id(parameter), parameter) for parameter in own if parameter is not None)
    return found
