"""`Target`, a base weight that can be selected, and all targets of a model."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapters.adapter import Slot
from adapters.layers.matrix import Matrix
from adapters.layers.quantized import logical_shape
from adapters.methods.core.method import Method
from adapters.runtime.adapted_layer import AdaptedLayer
from adapters.targets.models import roots

# The weights of an attention layer that are no modules.
_PROJECTIONS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})


@dataclass(slots=True, eq=False)
class Target:
    """A weight of the base model: `weight` of a module, or another parameter of one.

    Attributes:
        module: The module that holds the weight, itself also where adapters are around it.
        parameter: The name of the parameter in the module.
        paths: Its dotted paths: of the module, for a `weight`; several when the module is shared.
        slots: The modules that hold the module, or its adapters, and the keys there.
        attentions: Each `nn.MultiheadAttention` whose projection it is, with its path.
        node: The adapted layer that stands where the module was, if it has adapters.
    """

    module: nn.Module
    parameter: str
    paths: list[str]
    slots: list[Slot]
    attentions: list[tuple[str, nn.Module]]
    node: AdaptedLayer | None

    @property
    def path(self) -> str:
        """The first path."""
        return self.paths[0]

    @property
    def is_weight(self) -> bool:
        """Whether it is the `weight` of its module, rather than another parameter."""
        return self.parameter == "weight"

    @property
    def raw_parameter(self) -> Tensor | None:
        """The parameter as it is stored, without what is merged into it; None where it is computed from others."""
        value = self.module._parameters.get(self.parameter)
        return value if value is None or self.node is None else self.node.raw_parameter(self.parameter)

    @property
    def rows(self) -> int:
        """The number of outputs of the matrix, or of rows of another weight; 0 where there is none."""
        matrix = Matrix.of(self.module, self.parameter)
        if matrix is not None:
            return matrix.shape[-2]
        raw = self.raw_parameter
        return len(raw) if raw is not None and raw.ndim else 0

    def tie_key(self, method: Method) -> object:
        """Key that is equal for targets which share a parameter, and whose branches a method can share: tied ones."""
        value = self.raw_parameter
        return id(self) if value is None else (id(value), method.matrix(self.module, self.parameter))

    @property
    def named_modules(self) -> list[tuple[str, nn.Module]]:
        """Paths and modules that a pattern may match to select it by itself."""
        return [*((path, self.module) for path in self.paths), *self.attentions]

    def enclosing_modules(self, model: nn.Module, ancestors: bool) -> list[tuple[str, nn.Module]]:
        """Paths and modules that hold it: its own module, and with `ancestors` all those around that."""
        suffix = "" if self.is_weight else f".{self.parameter}"
        paths = [path.removesuffix(suffix) for path in self.paths]
        found = [(path, self.module) for path in paths]
        if ancestors:
            above = {path[:end] for path in paths for end in range(len(path)) if path[end] == "."}
            found += [(path, model.get_submodule(path)) for path in sorted(above)]
        return found


def all_targets(model: nn.Module) -> list[Target]:
    """All targets of a model in order: one for each module below it, and for each other parameter of such a module.

    A module is a target also where it has no `weight`, as a method may adapt it as a whole. What patches have added is
    left out.
    """
    found: dict[tuple[int, str], Target] = {}
    stack = [below for prefix, root in reversed([*roots(model)]) for below in _below(root, prefix)]
    while stack:
        path, parent, key, child = stack.pop()
        node = child if isinstance(child, AdaptedLayer) else None
        module = child if node is None else node.base
        others = [name for name, value in module._parameters.items() if value is not None and name != "weight"]
        for parameter in ["weight", *others]:
            target_path = path if parameter == "weight" else f"{path}.{parameter}"
            if (target := found.get((id(module), parameter))) is None:
                target = Target(module, parameter, [target_path], [(parent, key)], [], node)
                found[id(module), parameter] = target
            else:
                target.paths.append(target_path)
                target.slots += [(parent, key)] * ((parent, key) not in target.slots)
            if isinstance(module, nn.MultiheadAttention) and parameter in _PROJECTIONS:
                target.attentions.append((path, module))
            if isinstance(parent, nn.MultiheadAttention) and parameter == "weight":
                target.attentions.append((path.rpartition(".")[0], parent))
        if module._modules:
            stack += _below(module, f"{path}.")
    return list(found.values())


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the names and shapes of a model's weights, equal with patches and without."""
    shapes = (
        (path, tuple(logical_shape(value)))
        for target in all_targets(model)
        if (value := target.module._parameters.get(target.parameter)) is not None
        for path in target.paths
    )
    text = "".join(f"{path} {shape}\n" for path, shape in sorted(shapes))
    return hashlib.sha256(text.encode()).hexdigest()


def _below(parent: nn.Module, prefix: str) -> list[tuple[str, nn.Module, str, nn.Module]]:
    """The children of a module with their paths and slots, the last one first, without its parametrizations."""
    children = [(key, child) for key, child in parent._modules.items() if child is not None]
    if "parametrizations" in parent._modules and parametrize.is_parametrized(parent):
        children = [(key, child) for key, child in children if key != "parametrizations"]
    return [(prefix + key, parent, key, child) for key, child in reversed(children)]
