"""Several models that a patch goes into together: a pipeline of diffusers, or a dict of models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol, runtime_checkable
from weakref import WeakValueDictionary

from torch import nn

from adapters.errors import AdapterError


@runtime_checkable
class Pipeline(Protocol):
    """A pipeline as diffusers has it, with components by name, of which those that are modules get adapters."""

    @property
    def components(self) -> Mapping[str, object]: ...


Model = nn.Module | Mapping[str, nn.Module] | Pipeline


class Models(nn.Module):
    """The models of a pipeline or a dict as children of one module, which itself is never run.

    Attributes:
        name_or_path: The name that the pipeline was loaded by, if it says so.
    """

    def __init__(self, parts: Mapping[str, nn.Module], name_or_path: str | None) -> None:
        super().__init__()
        self.name_or_path = name_or_path
        for name, part in parts.items():
            self.add_module(name, part)


# A patch keeps the one it is in alive, and that its models, so that no `id` in a key is that of something else.
_together: WeakValueDictionary[tuple[tuple[str, int], ...], Models] = WeakValueDictionary()


def as_module(model: Model) -> nn.Module:
    """The model itself, or one module for all models of a pipeline or a dict, the same each time.

    Raises:
        AdapterError: The model is none of these.
    """
    if isinstance(model, nn.Module):
        return model
    parts: Mapping[str, object] = model if isinstance(model, Mapping) else getattr(model, "components", {})
    modules = {name: part for name, part in parts.items() if isinstance(part, nn.Module)}
    if not modules or (isinstance(model, Mapping) and len(modules) < len(model)):
        raise AdapterError(
            f"A {type(model).__name__} is no model: adapters go into a torch.nn.Module, a pipeline of diffusers, or a"
            " dict of modules."
        )
    key = tuple((name, id(part)) for name, part in modules.items())
    found = _together.get(key)
    if found is None:
        name_or_path = getattr(model, "name_or_path", None)
        _together[key] = found = Models(modules, name_or_path if isinstance(name_or_path, str) else None)
    return found


def roots(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The components of a model, each with the prefix of the paths in it; without one for a model by itself."""
    if not isinstance(model, Models):
        yield "", model
        return
    for name, part in model._modules.items():
        if part is not None:
            yield f"{name}.", part


def component_of(model: nn.Module) -> str:
    """The name of a diffusers model in its pipelines; empty for other models."""
    kind = type(model)
    if not kind.__module__.startswith("diffusers."):
        return ""
    return "unet" if "UNet" in kind.__name__ else "transformer" if "Transformer" in kind.__name__ else ""
