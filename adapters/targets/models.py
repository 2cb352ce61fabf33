"""Several models that a patch goes into together: a pipeline of diffusers, or a table of models by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable
from weakref import WeakValueDictionary

from torch import nn

from adapters.errors import AdapterError


@runtime_checkable
class Pipeline(Protocol):
    """What diffusers' pipelines have: their parts by name, of which those that are modules are taken."""

    @property
    def components(self) -> Mapping[str, object]: ...


Model = nn.Module | Mapping[str, nn.Module] | Pipeline


class Models(nn.Module):
    """The models of a pipeline or a table as children of one module, which itself is never run.

    Attributes:
        name_or_path: Where the pipeline came from, if it says so.
    """

    def __init__(self, parts: Mapping[str, nn.Module], name_or_path: str | None) -> None:
        super().__init__()
        self.name_or_path = name_or_path
        for name, part in parts.items():
            self.add_module(name, part)


# A patch keeps the one it is in alive, and that its models, so that no `id` in a key is that of something else.
_known: WeakValueDictionary[tuple[tuple[str, int], ...], Models] = WeakValueDictionary()


def as_module(model: Model) -> nn.Module:
    """The model itself, or one module for all models of a pipeline or a table, the same each time.

    Raises:
        AdapterError: It is none of these.
    """
    if isinstance(model, nn.Module):
        return model
    parts: Mapping[str, object] = model if isinstance(model, Mapping) else getattr(model, "components", {})
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not modules or (isinstance(model, Mapping) and len(modules) < len(model)):
        raise AdapterError(
            f"A {type(model).__name__} is no model: adapters go into a torch.nn.Module, a pipeline of diffusers, or a"
            " table of modules by name."
        )
    key = tuple((name, id(part)) for name, part in modules.items())
    found = _known.get(key)
    if found is None:
        name_or_path = getattr(model, "name_or_path", None)
        _known[key] = found = Models(modules, name_or_path if isinstance(name_or_path, str) else None)
    return found


def roots(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules below which a model has its layers, each with what their paths begin with."""
    if not isinstance(model, Models):
        yield "", model
        return
    for name, part in model._modules.items():
        if part is not None:
            yield f"{name}.", part


def component_of(model: nn.Module) -> str:
    """What a model of diffusers is called in its pipelines; empty for other models."""
    kind = type(model)
    if not kind.__module__.startswith("diffusers."):
        return ""
    return "unet" if "UNet" in kind.__name__ else "transformer" if "Transformer" in kind.__name__ else ""
