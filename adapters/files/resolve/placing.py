"""Where the layers of an adapter are in a checkpoint, and layers without values to put it into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

import weights
from adapters.files.checkpoint import Checkpoint
from adapters.files.resolve.checkpoint_names import names_in
from adapters.files.resolve.rotary import in_halves
from adapters.files.skeleton import Shapes
from adapters.methods import METHODS
from weights.disk.header import Slot

# The ends of the names of classes that have an output head which may share the tensor of the embedding.
_HEADS = ("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForPreTraining", "LMHeadModel", "WithLMHead")


def of_text(settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a language model, which may be a part of another one."""
    inside = settings.get("text_config")
    return inside if isinstance(inside, dict) else settings


def tied_names(checkpoint: Checkpoint, settings: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The tensors of a checkpoint that are two weights of their model: the embedding and the head of a language model.

    Args:
        checkpoint: The tensors.
        settings: What `config.json` says of each model.
    """
    tied: set[str] = set()
    for part, said in settings.items():
        rows = of_text(said).get("vocab_size")
        says = {**of_text(said), **said}.get("tie_word_embeddings")
        slots = checkpoint.parts[part].slots
        large = {name for name, slot in slots.items() if len(slot.shape) == 2 and slot.shape[0] == rows}
        headed = any(str(name).endswith(_HEADS) for name in said.get("architectures") or ())
        if headed and (says or (says is None and len(large) == 1)):
            tied |= {f"{part}.{name}".removeprefix(".") for name in large}
    return tied


def place(
    checkpoint: Checkpoint, settings: Mapping[str, Mapping[str, Any]], file: weights.AdapterFile
) -> tuple[weights.AdapterFile, dict[str, weights.LayerWeights], list[str]]:
    """An adapter with the paths that its layers have in a checkpoint, those that have none there, and what is wrong."""
    config = nn.Module()  # All that there is of the model.
    config.__dict__["config"] = SimpleNamespace(**of_text(settings.get("", {})))
    file = in_halves(config, file)
    aliases = {**file.aliases, **_prefixed(checkpoint, file)}
    file, absent, problems = names_in(checkpoint.parts, replace(file, aliases=aliases))
    if "" in checkpoint.parts:  # One model, which has no name.
        file = replace(file, layers={file.component_of(path)[1]: layer for path, layer in file.layers.items()})
    return replace(file, components=(), base_structure=None), absent, problems


def _prefixed(checkpoint: Checkpoint, file: weights.AdapterFile) -> dict[str, tuple[str, ...]]:
    """What layers are called where the model has them in a module of its own, or has none around them.

    A checkpoint of transformers may be of a model with a head or without: `bert.encoder.layer.0` or `encoder.layer.0`.
    """
    firsts = dict.fromkeys(name.partition(".")[0] for name in checkpoint.slots)
    modules = {name.rpartition(".")[0] for name in checkpoint.slots}.union(checkpoint.slots)
    found: dict[str, tuple[str, ...]] = {}
    for path in file.layers:
        inside = file.component_of(path)[1]
        first, _, rest = inside.partition(".")
        names = [name for name in (rest, *(f"{other}.{inside}" for other in firsts)) if name in modules]
        if first not in firsts and len(names) == 1:
            found[path] = (*file.aliases.get(path, ()), *names)
    return found


def standins(
    slots: Mapping[str, Slot], files: Sequence[weights.AdapterFile], read: Callable[[str], Tensor] | None = None
) -> nn.Module:
    """A model with the layers that adapters are for, without values.

    Args:
        slots: The tensors of the model.
        files: The adapters.
        read: Reads one of the tensors, for buffers.
    """
    shapes = Shapes(slots)
    contents: dict[str, list[weights.LayerWeights]] = {}
    buffers: dict[str, set[str]] = {}
    for file in files:
        for path, layer in file.layers.items():
            module = shapes.module(path)
            contents.setdefault(module, []).append(layer)
            method = METHODS.get(layer.method)
            own = "weight" if module == path else path.rpartition(".")[2]
            beside = layer.tensors.keys() - {own} if method is not None and method.files_have_buffers else ()
            buffers.setdefault(module, set()).update(beside)
    root = nn.Module()
    for module, content in contents.items():
        root._modules[module] = standin = shapes.layer(module, buffers[module], content)
        for name in sorted(buffers[module]):
            if read is not None and f"{module}.{name}" in slots:
                standin.register_buffer(name, read(f"{module}.{name}"))
    return root
