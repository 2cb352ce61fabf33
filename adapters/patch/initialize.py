"""`initialize`: LoRA starts that are found from data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters.activation.context import activated
from adapters.errors import AdapterError, LayerMismatchError, PatchStateError, TargetError
from adapters.layers.dtypes import widened
from adapters.layers.kinds import input_rows
from adapters.layers.weight import is_stored
from adapters.methods.core.data_init import Inputs
from adapters.methods.core.init import STARTS, Start
from adapters.methods.lora import LoRA
from adapters.patch.attachment import Attachment
from adapters.patch.patch import Patch
from adapters.runtime.adapted_layer import AdaptedLayer

Evidence = dict[int, Any]
"""What was seen of a layer, by the id of the branch's A: that of tied layers is one."""


def call(model: nn.Module, batch: Any) -> Any:
    """The output of a model for a batch: a mapping of named inputs, a tuple or list of inputs, or the only input."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def initialize(
    patch: Patch,
    batches: Iterable[Any] = (),
    run: Callable[[nn.Module, Any], Any] = call,
    *,
    originals: Mapping[str, Tensor] | None = None,
) -> None:
    """Give the branches of LoRA in a patch the start that their `init` finds from data.

    `"eva"`, `"corda"` and `"corda_kpm"` look at the inputs of the layers, `"lora_ga"` at the gradients of a loss, and
    `"loftq"` at what the weights were before they were quantised. The patch does not act meanwhile, the model is in
    evaluation mode, and nothing of it is changed: no mode, flag, gradient or hook stays. For inputs, a layer takes
    the memory of one square matrix; for gradients, that of its weight.

    Args:
        patch: An injected patch. Where a method starts without data, its branch is left as it is.
        batches: What to run the model on, once each.
        run: Runs the model on a batch, by default as `model(**batch)`, `model(*batch)` or `model(batch)`. For
            `"lora_ga"` it returns the loss, or an output that has it as `loss`.
        originals: The original weights by name, such as `weights.open("original.safetensors")`, for `"loftq"`.

    Raises:
        PatchStateError: The patch is not injected, or merged.
        AdapterError: No branch starts from data, data are missing (batches, originals, a loss, finite numbers), or
            there is one batch instead of several.
        TargetError: A layer is not reached by the batches, or its rank is too large for the start.
        LayerMismatchError: The originals lack a weight, or have it in another shape.
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise AdapterError("initialize() was given one batch: pass a list of them, or anything that yields them.")
    if not patch.injected or patch.merged:
        raise PatchStateError(f"The patch {patch.name!r} has to be injected, and not merged, to be initialised.")
    places = [place for place in patch.places if _start(place).needs]
    if not places:
        known = ", ".join(repr(name) for name, start in STARTS.items() if start.needs)
        raise AdapterError(f"No branch of the patch {patch.name!r} starts from data: give LoRA an init out of {known}.")
    with activated({patch: 0.0}):
        evidence = _observe(patch.model, places, batches, run) | _quantising_errors(places, originals)
        with torch.no_grad():
            own = [place for place in places if not place.branch.tied]
            weights = [_effective(place) for place in own]
            found = [_fit(place, weight, evidence) for place, weight in zip(own, weights, strict=True)]
            for place, weight, (down, up) in zip(own, weights, found, strict=True):
                _start(place).restart(place.branch, down, up)
                cast(LoRA, place.branch.method).settle(place.branch, weight)


def _start(place: Attachment) -> Start:
    method = place.branch.method
    return STARTS[method.init] if isinstance(method, LoRA) else STARTS["kaiming"]


def _needing(places: Sequence[Attachment], what: str) -> list[Attachment]:
    return [place for place in places if _start(place).needs == what]


def _key(place: Attachment) -> int:
    return id(place.branch.tensors()["lora_A"])


def _node(place: Attachment) -> AdaptedLayer:
    return cast(AdaptedLayer, place.node)


def _wide(x: Tensor) -> Tensor:
    return widened(x.detach())


def _effective(place: Attachment) -> Tensor:
    """The weight that the branch is applied to, as a matrix."""
    return place.branch.matrix.read(_wide(cast(Tensor, _node(place).effective(place.branch.parameter))))


def _fit(place: Attachment, weight: Tensor, evidence: Evidence) -> tuple[Tensor, Tensor]:
    """A and B for a branch, checked to be of its shapes."""
    method, seen = cast(LoRA, place.branch.method), evidence.get(_key(place))
    try:
        if seen is None:
            raise TargetError("the batches do not reach it: pass others, or exclude it from the patch")
        if not seen.is_finite() if isinstance(seen, Inputs) else not seen.isfinite().all():
            raise TargetError("what was seen of it is not finite: look for the batch that is not")
        down, up = cast(Any, _start(place).fit)(weight, seen, method.rank, method.scaling)
        if down.shape[-2] != method.rank or up.shape[-1] != method.rank:
            raise TargetError(f"a rank of {method.rank} is more than init={method.init!r} can find for this weight")
    except TargetError as problem:
        raise TargetError(f"{place.path} cannot start: {problem}.") from None
    return down, up


# What is seen


def _observe(
    model: nn.Module, places: Sequence[Attachment], batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]
) -> Evidence:
    """Run the batches, and remember the inputs of some layers and the gradients of others."""
    inputs, gradients = _needing(places, "inputs"), _needing(places, "gradients")
    if not (inputs or gradients):
        return {}
    weights = {_key(place): _own_weight(place) for place in gradients}
    seen: Evidence = {}
    number = -1
    with _left_as_it_is(model, weights.values()) as undo, torch.set_grad_enabled(bool(weights)):
        model.eval()
        for weight in weights.values():
            weight.requires_grad_(True)
        for place in inputs:
            undo.callback(_watch(place, seen).remove)
        for number, batch in enumerate(batches):  # noqa: B007 - it says below whether there was any
            output = run(model, batch)
            if weights:
                for key, gradient in zip(weights, _gradients(output, list(weights.values())), strict=True):
                    if gradient is not None:
                        seen[key] = seen.get(key, 0) + _wide(gradient.to_dense())
    if number < 0:
        raise AdapterError("initialize() was given no batches, which the start needs: pass some to run the model on.")
    matrices = {_key(place): place.branch.matrix for place in gradients}
    return {key: matrices[key].read(value) if key in matrices else value for key, value in seen.items()}


@contextlib.contextmanager
def _left_as_it_is(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[contextlib.ExitStack]:
    """The modes of all modules, and whether these weights take gradients, are afterwards what they were before."""
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for weight in weights:
            undo.callback(weight.requires_grad_, weight.requires_grad)
        yield undo


def _watch(place: Attachment, seen: Evidence) -> Any:
    """Remember the inputs of a layer from now on."""
    key, matrix = _key(place), place.branch.matrix

    def remember(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows = _wide(input_rows(layer, next(iter((*args, *kwargs.values())))))
        if key not in seen:
            seen[key] = Inputs.like(rows.new_empty(matrix.shape))
        seen[key].add(rows)

    return _node(place).base.register_forward_hook(remember, with_kwargs=True)


def _own_weight(place: Attachment) -> nn.Parameter:
    node, parameter = _node(place), place.branch.parameter
    weight = node.own_weight(parameter)
    if not (is_stored(node.base, parameter) and isinstance(weight, nn.Parameter) and weight.is_floating_point()):
        raise TargetError(f"{place.path} has no weight that takes a gradient: give it a LoRA with another init.")
    if any(parameter in branch.names for branch, _ in node.merged):
        raise PatchStateError(f"{place.path} has another patch merged in: unmerge it, to find the gradient of its own.")
    return weight


def _gradients(output: Any, weights: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    loss = getattr(output, "loss", output)
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        raise AdapterError(
            "init='lora_ga' needs the gradient of a loss: pass run=, which takes the model and a batch and returns one."
        )
    return torch.autograd.grad(loss, weights, allow_unused=True)


def _quantising_errors(places: Sequence[Attachment], originals: Mapping[str, Tensor] | None) -> Evidence:
    """The original weights less the present ones."""
    found: Evidence = {}
    for place in _needing(places, "originals"):
        if originals is None:
            raise AdapterError("init='loftq' needs the weights from before they were quantised: pass originals=.")
        branch = place.branch
        name = place.path if branch.parameter != "weight" else f"{place.path}.weight"
        own = cast(Tensor, _node(place).own_weight(branch.parameter))
        original = originals.get(name)
        if original is None or original.shape != own.shape:
            shape = "missing" if original is None else f"{tuple(original.shape)} instead of {tuple(own.shape)}"
            raise LayerMismatchError(f"The originals do not fit the model: {name} is {shape}.")
        found[_key(place)] = branch.matrix.read(_wide(original.to(own.device)) - _wide(own))
    return found
