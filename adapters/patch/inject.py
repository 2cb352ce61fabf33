"""`inject`, new adapters for the targets of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch

from adapters.activation.switch import finite
from adapters.errors import AdapterError
from adapters.layers.sharded import (
    check_before,
)
from adapters.methods.core.building import build_all, tied_to
from adapters.methods.core.method import Method
from adapters.patch.attachment import Attachment
from adapters.patch.patch import Patch
from adapters.patch.registry import check_name
from adapters.patch.transaction import without_collections
from adapters.targets.models import Model, as_module
from adapters.targets.pattern import Pattern, Patterns, as_rules
from adapters.targets.selection import select
from adapters.targets.spec import weight_spec
from adapters.targets.target import Target


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
) -> Patch:
    """Put a new adapter of a method beside every layer that is targeted.

    At first nothing changes what is computed, but for methods that start at random: prompts and prefixes, VBLoRA, and
    HRA with an odd rank or `gram_schmidt`.

    Layers that share a weight have one adapter between them, also when only one of them is targeted, if they use it
    in a way that is the same to the method: an embedding and a head do for one that trains whole rows, not for LoRA.

    Args:
        model: Any module: a Chain, a torch model, a transformers or diffusers model; or several together, as a
            pipeline of diffusers or a table of modules, whose names are then in front of paths.
        method: The method, or a mapping of patterns to methods, of which a layer has the first that matches it.
        targets: Which layers: a dotted suffix of whole names (`"q_proj"`, `"attn.q_proj"`), a glob (`*` within one
            name, `**` across dots), a compiled regex (of the whole path), a type, `f(path, module) -> bool`, or a
            list of these. None means every layer the method supports, except the output head.
        exclude: Layers to leave out, chosen in the same ways.
        name: The name of the patch, unique in the model.
        scale: How strongly it acts.
        dtype: The dtype of its tensors, by default that of each layer's weight.
        device: Their device, by default that of each layer's weight.
        seed: Makes the initial values the same each time, without touching torch's generators.
        freeze_base: Turn `requires_grad` off for the parameters of the base, until the patch is ejected.

    Raises:
        TargetError: A pattern matches nothing, or a layer cannot be adapted by the method.
        PatchNameError: The name is in use.
        AdapterError: The model is no module, the method no method, or another argument is of the wrong kind.
    """
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
            chosen = select(model, rules, exclude)
            check_before((layer for layers, _ in chosen for layer in layers), trainable=True)
            places = _new_places(chosen, device, dtype)
        return Patch(name, model, places, scale, freeze_base).inject()


def _new_places(
    chosen: Sequence[tuple[list[Target], Method]], device: torch.device | str | None, dtype: torch.dtype | None
) -> list[Attachment]:
    """New branches for layers, and their places."""
    sites = [weight_spec(layer, method, device, dtype) for (layer, *_), method in chosen]
    for ((layer, *_), method), site in zip(chosen, sites, strict=True):
        method.check_site(site)
        method.check_training(layer.module, layer.parameter)
    branches = build_all([(method, site) for (_, method), site in zip(chosen, sites, strict=True)])
    places: list[Attachment] = []
    for ((layer, *tied), _), branch in zip(chosen, branches, strict=True):
        places.append(Attachment.of(layer, branch))
        places += [Attachment.of(other, tied_to(branch)) for other in tied]
    return places


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
