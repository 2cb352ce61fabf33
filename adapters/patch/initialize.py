"""`initialize`: initialisation of LoRA from data."""

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
from adapters.methods.core.decomposed import WeightDecomposed
from adapters.methods.core.init import INITS, Init
from adapters.methods.lora import LoRA
from adapters.patch.attachment import Attachment
from adapters.patch.merge import is_partly_merged
from adapters.patch.patch import Patch
from adapters.runtime.adapted_layer import AdaptedLayer

Statistics = dict[int, Any]
"""Statistics for each branch by the id of its A, which is one for tied layers: the covariance of inputs, a gradient, or
a quantization error."""


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
    """Initialize the branches of LoRA in a patch from data, as their `init` says.

    `"eva"`, `"corda"` and `"corda_kpm"` use the inputs of the layers, `"lora_ga"` the gradients of a loss, and
    `"loftq"` the weights from before they were quantized. The patch is not active meanwhile, the model is in evaluation
    mode, and nothing of it is changed: no mode, flag, gradient or hook stays. For inputs, a layer takes the memory of
    one square matrix; for gradients, that of its weight.

    Args:
        patch: An injected patch. Branches that are initialized without data are left as they are.
        batches: Batches to run the model on, once each.
        run: Runs the model on a batch, by default as `model(**batch)`, `model(*batch)` or `model(batch)`. For
            `"lora_ga"` it returns the loss, or an output that has it as `loss`.
        originals: The original weights by name, such as `weights.open("original.safetensors")`, for `"loftq"`.

    Raises:
        PatchStateError: The patch is not injected, or merged.
        AdapterError: No branch is initialized from data, data are missing (batches, originals, a loss, finite numbers),
            or there is one batch instead of several.
        TargetError: A layer is not reached by the batches, or its rank is larger than its `init` can find.
        LayerMismatchError: The originals lack a weight, or have it in another shape.

    Example:
        >>> patch = adapters.inject(model, adapters.LoRA(rank=2, init="eva"))
        >>> batches = [torch.randn(16, 8) for _ in range(4)]
        >>> adapters.initialize(patch, batches)
    """
    if isinstance(batches, (Tensor, Mapping)):
        raise AdapterError("initialize() was given one batch: pass a list of them, or anything that yields them.")
    if not patch.injected or is_partly_merged(patch):
        raise PatchStateError(f"The patch {patch.name!r} has to be injected, and not merged, to be initialized.")
    attachments = [attachment for attachment in patch.attachments if _init(attachment).needs]
    if not attachments:
        known = ", ".join(repr(name) for name, start in INITS.items() if start.needs)
        raise AdapterError(
            f"No branch of the patch {patch.name!r} is initialized from data: give LoRA an init out of {known}."
        )
    with activated({patch: 0.0}):
        statistics = _observe(patch.model, attachments, batches, run) | _quantization_errors(attachments, originals)
        with torch.no_grad():
            own = [attachment for attachment in attachments if not attachment.branch.tied]
            weights = [_effective(attachment) for attachment in own]
            found = [_fit(attachment, weight, statistics) for attachment, weight in zip(own, weights, strict=True)]
            for attachment, weight, (down, up) in zip(own, weights, found, strict=True):
                _init(attachment).apply_again(attachment.branch, down, up)
                if isinstance(method := attachment.branch.method, WeightDecomposed):
                    method.measure(attachment.branch, weight)


def _lora(attachment: Attachment) -> LoRA | None:
    """The LoRA that a branch computes, by itself or inside of DoRA."""
    method = attachment.branch.method
    inner = method.inner if isinstance(method, WeightDecomposed) else method
    return inner if isinstance(inner, LoRA) else None


def _init(attachment: Attachment) -> Init:
    return INITS["kaiming" if (lora := _lora(attachment)) is None else lora.init]


def _needing(attachments: Sequence[Attachment], what: str) -> list[Attachment]:
    return [attachment for attachment in attachments if _init(attachment).needs == what]


def _key(attachment: Attachment) -> int:
    return id(attachment.branch.tensors()["lora_A"])


def _node(attachment: Attachment) -> AdaptedLayer:
    return cast(AdaptedLayer, attachment.node)


def _wide(x: Tensor) -> Tensor:
    return widened(x.detach())


def _effective(attachment: Attachment) -> Tensor:
    """The weight that the branch is applied to, as a matrix, in at least single precision."""
    return attachment.branch.matrix.read(
        _wide(cast(Tensor, _node(attachment).effective_weight(attachment.branch.parameter)))
    )


def _fit(attachment: Attachment, weight: Tensor, statistics: Statistics) -> tuple[Tensor, Tensor]:
    """A and B for a branch, checked to be of its shapes."""
    method, seen = cast(LoRA, _lora(attachment)), statistics.get(_key(attachment))
    try:
        if seen is None:
            raise TargetError("the batches do not reach it: pass others, or exclude it from the patch")
        if not seen.is_finite() if isinstance(seen, Inputs) else not seen.isfinite().all():
            raise TargetError("its inputs or gradients are not finite: look for the batch that is not")
        down, up = cast(Any, _init(attachment).fit)(weight, seen, method.rank, method.scaling)
        if down.shape[-2] != method.rank or up.shape[-1] != method.rank:
            raise TargetError(f"a rank of {method.rank} is more than init={method.init!r} can find for this weight")
    except TargetError as problem:
        raise TargetError(f"{attachment.path} cannot be initialized: {problem}.") from None
    return down, up


# Statistics


def _observe(
    model: nn.Module, attachments: Sequence[Attachment], batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]
) -> Statistics:
    """Run the batches, and collect the inputs of some layers and the gradients of others."""
    inputs, gradients = _needing(attachments, "inputs"), _needing(attachments, "gradients")
    if not (inputs or gradients):
        return {}
    weights = {_key(attachment): _base_weight(attachment) for attachment in gradients}
    seen: Statistics = {}
    number = -1
    with _restored(model, weights.values()) as undo, torch.set_grad_enabled(bool(weights)):
        model.eval()
        for weight in weights.values():
            weight.requires_grad_(True)
        for attachment in inputs:
            undo.callback(_watch(attachment, seen).remove)
        for number, batch in enumerate(batches):  # noqa: B007 - it says below whether there was any
            output = run(model, batch)
            if weights:
                for key, gradient in zip(weights, _gradients(output, list(weights.values())), strict=True):
                    if gradient is not None:
                        seen[key] = seen.get(key, 0) + _wide(gradient.to_dense())
    if number < 0:
        raise AdapterError("initialize() was given no batches, which init= needs: pass some to run the model on.")
    matrices = {_key(attachment): attachment.branch.matrix for attachment in gradients}
    return {key: matrices[key].read(value) if key in matrices else value for key, value in seen.items()}


@contextlib.contextmanager
def _restored(model: nn.Module, weights: Iterable[nn.Parameter]) -> Iterator[contextlib.ExitStack]:
    """Restore the modes of all modules, and whether weights take gradients, after the block."""
    with contextlib.ExitStack() as undo:
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for weight in weights:
            undo.callback(weight.requires_grad_, weight.requires_grad)
        yield undo


def _watch(attachment: Attachment, seen: Statistics) -> Any:
    """Collect the inputs of a layer from now on."""
    key, matrix = _key(attachment), attachment.branch.matrix

    def collect(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        rows = _wide(input_rows(layer, next(iter((*args, *kwargs.values())))))
        if key not in seen:
            seen[key] = Inputs.like(rows.new_empty(matrix.shape))
        seen[key].add(rows)

    return _node(attachment).base.register_forward_hook(collect, with_kwargs=True)


def _base_weight(attachment: Attachment) -> nn.Parameter:
    node, parameter = _node(attachment), attachment.branch.parameter
    weight = node.base_weight(parameter)
    if not (is_stored(node.base, parameter) and isinstance(weight, nn.Parameter) and weight.is_floating_point()):
        raise TargetError(f"{attachment.path} has no weight that takes a gradient: give it a LoRA with another init.")
    if any(parameter in branch.changes for branch, _ in node.merged):
        raise PatchStateError(
            f"{attachment.path} has another patch merged in: unmerge it, to find the gradient of its own."
        )
    return weight


def _gradients(output: Any, weights: list[nn.Parameter]) -> tuple[Tensor | None, ...]:
    loss = getattr(output, "loss", output)
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad):
        raise AdapterError(
            "init='lora_ga' needs the gradient of a loss: pass run=, which takes the model and a batch and returns one."
        )
    return torch.autograd.grad(loss, weights, allow_unused=True)


def _quantization_errors(attachments: Sequence[Attachment], originals: Mapping[str, Tensor] | None) -> Statistics:
    """The original weights minus the present ones, as matrices."""
    found: Statistics = {}
    for attachment in _needing(attachments, "originals"):
        if originals is None:
            raise AdapterError("init='loftq' needs the weights from before they were quantized: pass originals=.")
        branch = attachment.branch
        name = attachment.path if branch.parameter != "weight" else f"{attachment.path}.weight"
        own = cast(Tensor, _node(attachment).base_weight(branch.parameter))
        original = originals.get(name)
        if original is None or original.shape != own.shape:
            shape = "missing" if original is None else f"{tuple(original.shape)} instead of {tuple(own.shape)}"
            raise LayerMismatchError(f"The originals do not fit the model: {name} is {shape}.")
        found[_key(attachment)] = branch.matrix.read(_wide(original.to(own.device)) - _wide(own))
    return found
