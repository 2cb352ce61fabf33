"""`inject`: new branches at the targets of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Never

import torch

from adapters.activation.switch import finite
from adapters.errors import AdapterError
from adapters.layers.sharded import check_before
from adapters.methods.core.building import build_all, tied_to
from adapters.methods.core.method import Method
from adapters.patch.attachment import Attachment
from adapters.patch.patch import Patch
from adapters.patch.registry import check_name
from adapters.patch.transaction import without_collections
from adapters.targets.models import Model, as_module
from adapters.targets.pattern import Pattern, Patterns, as_rules
from adapters.targets.selection import Selection, select
from adapters.targets.spec import weight_spec


def inject(
    model: Model,
    method: Method | Mapping[Pattern, Method],
    targets: Patterns | None = None,
    exclude: Patterns | None = None,
    *,
    name: str = "default",
    scale: float = 1.0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
    freeze_base: bool = True,
    **unknown: Never,
) -> Patch:
    """Inject a new patch: a branch of a method at every target, with the base model frozen.

    At first nothing changes what is computed, but for methods that are initialized at random: prompts and prefixes,
    VBLoRA, and HRA with an odd rank or `gram_schmidt`.

    Layers that share a weight share a branch, also when only one of them is targeted, if the method sees the weight as
    the same matrix in both: an embedding and a head do for one that trains whole rows, not for LoRA.

    Args:
        model: Any module: a Chain, a torch model, a transformers or diffusers model; or several together, as a
            pipeline of diffusers or a dict of modules, whose names are then in front of paths.
        method: The method, or a mapping of patterns to methods, of which a layer has the first that matches it.
        targets: The layers: a dotted suffix of whole names (`"q_proj"`, `"attn.q_proj"`), a glob (`*` within one name,
            `**` across dots), a compiled regex (of the whole path), a type, `f(path, module) -> bool`, or a list of
            these. None means every layer the method supports, except the output head.
        exclude: Layers to leave out, by the same patterns.
        name: The name of the patch, unique in the model.
        scale: How strongly it acts.
        dtype: The dtype of its tensors, by default that of each layer's weight.
        device: Their device, by default that of each layer's weight.
        seed: Random seed of the initial values, which leaves torch's generators alone.
        freeze_base: Turn `requires_grad` off for the parameters of the base, until the patch is ejected.

    Raises:
        TargetError: A pattern matches nothing, or a layer cannot be adapted by the method.
        PatchNameError: The name is in use.
        AdapterError: The model is no module, the method no method, or another argument is of the wrong kind, or is
            one of another library.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> patch = adapters.inject(model, adapters.LoRA(rank=2), targets=torch.nn.Linear)
        >>> optimizer = torch.optim.AdamW(patch.parameters())
    """
    _refuse(unknown, method)
    model = as_module(model)
    check_name(model, name)
    finite(scale, f"The scale of {name!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise AdapterError(f"dtype= has to be one of floating point, such as torch.float32, not {dtype!r}.")
    if not (seed is None or isinstance(seed, int)):
        raise AdapterError(f"seed= has to be an integer, not {seed!r}.")
    rules = as_rules(method, targets)
    for value in rules.values():
        if not isinstance(value, Method):
            raise AdapterError(f"{value!r} is no method: pass one with its numbers, such as LoRA(rank=8).")
    with without_collections():
        with _seeded(seed):
            selection = select(model, rules, exclude)
            check_before(selection.targets, trainable=True)
            attachments = _new_attachments(selection, device, dtype)
        return Patch(name, model, attachments, scale, freeze_base).inject()


# Arguments of other libraries, and the call that stands for each here.
_HABITS = {
    "target_modules": "inject(model, {method}, targets={value!r})",
    "exclude_modules": "inject(model, {method}, exclude={value!r})",
    "modules_to_save": "inject(model, {{{copies}, '**': {method}}})",
    "adapter_name": "inject(model, {method}, name={value!r})",
    "r": "inject(model, LoRA(rank={value!r}))",
    "rank": "inject(model, LoRA(rank={value!r}))",
    "alpha": "inject(model, LoRA(alpha={value!r}))",
    "lora_alpha": "inject(model, LoRA(alpha={value!r}))",
    "lora_dropout": "inject(model, LoRA(dropout={value!r}))",
}


def _refuse(unknown: Mapping[str, object], method: object) -> None:
    """Raise for arguments that are not known, with the mended call for those of other libraries."""
    for argument, value in unknown.items():
        if argument not in _HABITS:
            raise TypeError(f"inject() got an unexpected keyword argument {argument!r}")
        modules = value if isinstance(value, (list, tuple, set)) else [value]
        copies = ", ".join(f"{module!r}: Copy()" for module in modules)
        call = _HABITS[argument].format(value=value, method=method, copies=copies)
        raise AdapterError(f"inject() has no {argument}=: write {call} instead.")


def _new_attachments(
    selection: Selection, device: torch.device | str | None, dtype: torch.dtype | None
) -> list[Attachment]:
    """New branches for targets, and where they belong."""
    specs = [(method, weight_spec(target, method, device, dtype)) for (target, *_), method in selection]
    for ((target, *_), _), (method, spec) in zip(selection, specs, strict=True):
        method.check_spec(spec)
        method.check_training(target.module, target.parameter)
    attachments: list[Attachment] = []
    for ((target, *tied), _), branch in zip(selection, build_all(specs), strict=True):
        attachments.append(Attachment.of(target, branch))
        attachments += [Attachment.of(other, tied_to(branch)) for other in tied]
    return attachments


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Draw from this random seed in the block, if there is one, and leave torch's generators as they are."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
