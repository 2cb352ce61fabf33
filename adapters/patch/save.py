"""Saving: a patch as an adapter file, on the disk or on the Hub."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Literal

from torch import Tensor, nn

import weights
from adapters.errors import AdapterError, PatchStateError
from adapters.layers.kinds import buffers
from adapters.layers.sharded import gather, on_rank_zero
from adapters.patch.attachment import Attachment
from adapters.patch.parameters import named_tensors
from adapters.patch.record import PatchRecord
from adapters.targets.models import Models, component_of
from adapters.targets.target import fingerprint
from weights.formats import canonical
from weights.hub.card import CARD

Format = Literal["peft", "diffusers", "lycoris", "kohya", "mlx", "fluxion"]
"""The formats that a patch is written in. Formats that were registered besides have names of their own."""


def adapter_file(patch: PatchRecord, component: str | None) -> weights.AdapterFile:
    """The content of a file for a patch, with the names of the model.

    Raises:
        PatchStateError: The patch is evicted, or two branches of one method would have one name in a file.
        AdapterError: A component is named for several models, or layers do not share what a file has once.
    """
    patch.require_tensors()
    model = patch.model
    patch.reshard()
    several = tuple(name for name, _ in model.named_children()) if isinstance(model, Models) else ()
    if component and several:
        raise AdapterError(f"component={component!r} is for one model, and the patch {patch.name!r} is in several.")
    front = component_of(model) if component is None else component
    layers: dict[str, weights.LayerWeights] = {}
    for attachment in patch.attachments:
        branch, method = attachment.branch, attachment.branch.method
        if branch.tied and method.tied_in_files:
            continue
        path = "" if method.whole_model else ".".join(filter(None, (front, attachment.path)))
        if path in layers:
            raise PatchStateError(f"A file holds one {type(method).__name__}, not another at {attachment.path}.")
        layers[path] = _layer_weights(attachment)
    return weights.AdapterFile(
        layers,
        base_model=_base_model_name(model),
        base_structure=fingerprint(model),
        shared=_shared_tensors(patch),
        task=_task(model),
        components=several or (front,) * bool(front),
    )


def _layer_weights(attachment: Attachment) -> weights.LayerWeights:
    """The content of one layer of a file, with tensors gathered from all processes."""
    branch = attachment.branch
    method, tensors = branch.method.saved(branch)
    if method.files_have_buffers and branch.parameter == "weight" and attachment.target is not None:
        tensors = {**tensors, **buffers(attachment.target)}
    return weights.LayerWeights(method.key, method.hyperparameters(), _gathered(tensors))


def _shared_tensors(patch: PatchRecord) -> dict[str, Tensor]:
    """The tensors that a file has once for all layers."""
    shared: dict[str, Tensor] = {}
    for attachment in patch.attachments:
        if attachment.branch.tied and attachment.branch.method.tied_in_files:
            continue
        for name, tensor in attachment.branch.shared_tensors().items():
            if shared.setdefault(name, tensor) is not tensor:
                raise AdapterError(
                    f"The layers of the patch {patch.name!r} do not all share the same {name}, and a file has one:"
                    " make a patch for each set of hyperparameters."
                )
    return _gathered(shared)


def _gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: gather(tensor.detach()) for name, tensor in tensors.items()}


def save(patch: PatchRecord, path: str | PathLike[str], format: str | None, component: str | None) -> Path:
    """Write a patch to files, in the first process where several have it sharded."""
    file = adapter_file(patch, component)
    on_rank_zero(_sharded(patch), lambda: write_file(file, Path(path), format))
    return Path(path)


def write_file(file: weights.AdapterFile, path: Path, format: str | None) -> str:
    """Write an adapter file, by default in PEFT's format, or where that cannot hold it in this library's.

    Returns:
        The name of the format.
    """
    if format is None:
        try:
            weights.write_adapter(file, path, format="peft")
        except weights.FileFormatError:
            format = "fluxion"
        else:
            return "peft"
    weights.write_adapter(file, path, format=format)
    return canonical(format)


def publish(
    patch: PatchRecord,
    repo_id: str,
    *,
    private: bool | None,
    revision: str | None,
    create_pr: bool,
    token: str | None,
    commit_message: str | None,
    license: str | None,
    tags: Collection[str],
    format: str | None,
    component: str | None,
    dry_run: bool,
) -> str:
    """Write a patch and a model card to a folder, and publish that, in the first process where several share it."""
    file = adapter_file(patch, component)
    name = repo_id.rpartition("/")[2]

    def run() -> str:
        with tempfile.TemporaryDirectory() as folder:
            alone = [f"{name}.safetensors"] if format and canonical(format) == "lycoris" else []
            written = write_file(file, Path(folder, *alone), format)
            card = weights.model_card(file, written, repo_id=repo_id, license=license, tags=tags)
            Path(folder, CARD).write_text(card, encoding="utf-8")
            return weights.publish(
                folder,
                repo_id,
                private=private,
                revision=revision,
                create_pr=create_pr,
                token=token,
                commit_message=commit_message or f"Upload {name}",
                dry_run=dry_run,
            )

    return on_rank_zero(_sharded(patch), run)


def _sharded(patch: PatchRecord) -> list[Tensor]:
    return [tensor.detach() for _, tensor in named_tensors(patch)]


def _base_model_name(model: nn.Module) -> str | None:
    """The name that a transformers or diffusers model was loaded by."""
    for holder in (model, getattr(model, "config", None)):
        name = getattr(holder, "name_or_path", None) or getattr(holder, "_name_or_path", None)
        if isinstance(name, str) and name:
            return name
    return None


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def _task(model: nn.Module) -> str | None:
    """The task of a transformers model in PEFT's words, by the end of its class's name."""
    name = type(model).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)
