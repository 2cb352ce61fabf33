"""`Target`, a base weight that can be selected, and all targets of a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapters.adapter import Slot
from adapters.layers.quantized import logical_shape
from adapters.methods.core.method import Method
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.targets.models import roots

# The weights of an attention layer that are not modules.
_PROJECTIONS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})


@dataclass(slots=True, eq=False)
class Target:
    """A weight of the base model: `weight` of a module, or a parameter that is no module's `weight`.

    Attributes:
        module: The module that holds it, itself also where adapters are around it.
        parameter: The name of the parameter in the module.
        paths: Its dotted paths: of the module, for a `weight`; several when the module is shared.
        slots: The modules that hold the module, or its adapters, and the keys there.
        owners: Modules made of several weights that this one belongs to, and their paths.
        node: What stands where the module was, if it has adapters.
    """

    module: nn.Module
    parameter: str
    paths: list[str]
    slots: list[Slot]
    owners: list[tuple[str, nn.Module]]
    node: AdaptedLayer | None

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]

    def use(self, method: Method) -> object:
        """Equal for layers that use one parameter in a way that is the same to a method."""
        value = self.own
        return id(self) if value is None else (id(value), method.matrix(self.module, self.parameter))

    @property
    def own(self) -> Tensor | None:
        """The parameter, without what is merged into it; None where there is none, or it is computed from others."""
        value = self.module._parameters.get(self.parameter)
        return value if value is None or self.node is None else self.node.stored(self.parameter)

    @property
    def names(self) -> list[tuple[str, nn.Module]]:
        """The paths a pattern may match, and the modules a type may match."""
        return [*((path, self.module) for path in self.paths), *self.owners]

    def holders(self, model: nn.Module, all_the_way_up: bool) -> list[tuple[str, nn.Module]]:
        """The module of a parameter with its paths, and those around it if these count too."""
        suffix = "" if self.parameter == "weight" else f".{self.parameter}"
        paths = [path.removesuffix(suffix) for path in self.paths]
        found = [(path, self.module) for path in paths]
        if all_the_way_up:
            above = {path[:end] for path in paths for end in range(len(path)) if path[end] == "."}
            found += [(path, model.get_submodule(path)) for path in sorted(above)]
        return found


def all_targets(model: nn.Module) -> list[Target]:
    """Every module below a model and every parameter of its own besides `weight`, in order, each once.

    What patches have added is left out.
    """
    found: dict[tuple[int, str], Target] = {}
    stack = [below for prefix, root in reversed([*roots(model)]) for below in _below(root, prefix)]
    while stack:
        path, parent, key, child = stack.pop()
        node = child if isinstance(child, AdaptedLayer) else None
        module = child if node is None else node.base
        bare = [name for name, value in module._parameters.items() if value is not None and name != "weight"]
        for parameter in ["weight", *bare]:
            own_path = path if parameter == "weight" else f"{path}.{parameter}"
            if (layer := found.get((id(module), parameter))) is None:
                layer = Target(module, parameter, [own_path], [(parent, key)], [], node)
                found[id(module), parameter] = layer
            else:
                layer.paths.append(own_path)
                layer.slots += [(parent, key)] * ((parent, key) not in layer.slots)
            if isinstance(module, nn.MultiheadAttention) and parameter in _PROJECTIONS:
                layer.owners.append((path, module))
            if isinstance(parent, nn.MultiheadAttention) and parameter == "weight":
                layer.owners.append((path.rpartition(".")[0], parent))
        if module._modules:
            stack += _below(module, f"{path}.")
    return list(found.values())


def structure(model: nn.Module) -> str:
    """A fingerprint of the names and shapes of a model's weights, the same with patches and without."""
    shapes = (
        (path, tuple(logical_shape(value)))
        for layer in all_targets(model)
        if (value := layer.module._parameters.get(layer.parameter)) is not None
        for path in layer.paths
    )
    text = "".join(f"{path} {shape}\n" for path, shape in sorted(shapes))
    return hashlib.sha256(text.encode()).hexdigest()


def _below(parent: nn.Module, prefix: str) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """The children of a module with their paths and slots, the last one first, without what computes its weights."""
    children = [(key, child) for key, child in parent._modules.items() if child is not None]
    if "parametrizations" in parent._modules and parametrize.is_parametrized(parent):
        children = [(key, child) for key, child in children if key != "parametrizations"]
    return [(prefix + key, parent, key, child) for key, child in reversed(children)]
