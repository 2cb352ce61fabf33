"""Choosing layers: every layer of a model with its paths and places, and the patterns that select some of them."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn.utils import parametrize

from adapters.adapted import Adapted
from adapters.adapter import Slot
from adapters.errors import TargetError
from adapters.layers import UNSUPPORTED
from adapters.models import roots
from adapters.quantized import logical_shape

if TYPE_CHECKING:
    from adapters.method import Method

Pattern = str | re.Pattern[str] | type[nn.Module] | Callable[[str, nn.Module], bool]
Patterns = Pattern | Iterable[Pattern]

# The weights of an attention layer that are not modules.
_PROJECTIONS = frozenset({"in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"})

# What a regular expression may have in it, and neither a path nor a glob has.
_REGEX = re.compile(r"[\\()|\[\]+?^$]|\.\*[^.]|^\.")

# Names that models give to the layer that makes the final scores.
_HEAD_NAMES = frozenset({"lm_head", "classifier", "score", "head", "output_head"})


@dataclass(slots=True, eq=False)
class Layer:
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
    node: Adapted | None

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


def layers(model: nn.Module) -> list[Layer]:
    """Every module below a model and every parameter of its own besides `weight`, in order, each once.

    What patches have added is left out.
    """
    found: dict[tuple[int, str], Layer] = {}
    stack = [below for prefix, root in reversed([*roots(model)]) for below in _below(root, prefix)]
    while stack:
        path, parent, key, child = stack.pop()
        node = child if isinstance(child, Adapted) else None
        module = child if node is None else node.base
        bare = [name for name, value in module._parameters.items() if value is not None and name != "weight"]
        for parameter in ["weight", *bare]:
            own_path = path if parameter == "weight" else f"{path}.{parameter}"
            if (layer := found.get((id(module), parameter))) is None:
                layer = Layer(module, parameter, [own_path], [(parent, key)], [], node)
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
        for layer in layers(model)
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


def select(
    model: nn.Module, rules: Mapping[Pattern | None, Method], exclude: Patterns | None
) -> list[tuple[list[Layer], Method]]:
    """The layers that rules select, each with the method of the first rule that matches and can adapt it.

    Layers that use one parameter in a way that is the same to the method come together, whichever of them was
    selected.

    Args:
        model: The model whose layers are looked at.
        rules: Patterns and their methods. The pattern None matches what the method adapts by default.
        exclude: Patterns of layers to leave out.

    Raises:
        TargetError: A pattern matches nothing, or a name selects a layer that the method cannot adapt.
    """
    everything = layers(model)
    if not everything:
        raise TargetError(
            f"This {type(model).__name__} has no layers below it: put it inside another module, so that an adapter can"
            " take its place."
        )
    selectors = [_Selector(pattern, method, model) for pattern, method in rules.items()]
    excluded = [_Selector(pattern, None, model) for pattern in _as_list(exclude)]
    chosen: list[tuple[Layer, Method]] = []
    rest: list[Layer] = []
    for layer in everything:
        matching = [selector for selector in selectors if selector.matches(layer, selector.method)]
        able = [selector for selector in matching if selector.can_adapt(layer)]
        first = (able or matching)[0].method if matching else None
        if not matching and not excluded:
            rest.append(layer)
            continue
        left_out = [selector for selector in excluded if selector.matches(layer, first)]
        for selector in left_out:
            selector.useful = True
        if not left_out:
            rest.append(layer)
        if left_out or not matching:
            continue
        method = cast("Method", first)
        if able:
            chosen.append((layer, method))
            for selector in able:
                selector.useful |= selector.method == method
        elif matching[0].is_name and (_is_left(layer) if method.within() else matching[0].names(layer)):
            raise TargetError(
                f"{layer.path} is a {type(layer.module).__name__}, which {type(method).__name__} cannot adapt:"
                f" exclude it or choose another method{_inside(layer)}."
            )
    for selector in (*selectors, *excluded):
        if not selector.useful:
            raise TargetError(selector.complaint(everything, {id(layer) for layer, _ in chosen}))
    return _with_tied(chosen, rest)


def _inside(layer: Layer) -> str:
    """How to choose what is in a block rather than the block."""
    return f", or choose what is in it by '{layer.path}.**'" if layer.module._modules else ""


def _is_left(layer: Layer) -> bool:
    """Whether there is a parameter that no method can adapt, though it is one of what was named."""
    return layer.own is not None and isinstance(layer.module, UNSUPPORTED)


def _with_tied(chosen: list[tuple[Layer, Method]], rest: list[Layer]) -> list[tuple[list[Layer], Method]]:
    """Layers together with those of the rest that are tied to them, each once, with the method of the first of them."""
    candidates: dict[int, list[Layer]] = {}
    for layer in rest:
        candidates.setdefault(id(layer.own), []).append(layer)
    taken: set[int] = set()
    groups: list[tuple[list[Layer], Method]] = []
    for layer, method in chosen:
        if id(layer) in taken:
            continue
        own = layer.own
        group = [layer] if own is None else candidates[id(own)]
        if len(group) > 1:
            use = layer.use(method)
            group = [other for other in group if id(other) not in taken and other.use(method) == use]
        taken.update(map(id, group))
        groups.append((group, method))
    return groups


class _Selector:
    """One pattern, what it is for, and whether it was of any use."""

    def __init__(self, pattern: Pattern | None, method: Method | None, model: nn.Module) -> None:
        self.pattern = pattern
        self.method = method
        self.model = model
        self.useful = False
        self.is_name = isinstance(pattern, str) and "*" not in pattern
        # A parameter that is no layer's weight is a target when it is named, not when it happens to be there.
        named = isinstance(pattern, str) and "*" not in pattern.rpartition(".")[2]
        self._reaches_parameters = named or isinstance(pattern, re.Pattern)
        self._matches = _matcher(pattern, model, method)

    def matches(self, layer: Layer, method: Method | None) -> bool:
        """Whether it matches a layer, or what makes a method choose it."""
        bare = layer.parameter != "weight"
        if bare and not (layer.owners or self._reaches_parameters or (method and method.chooses(layer.parameter))):
            return False
        names = [] if bare and not layer.owners and not self._reaches_parameters else layer.names
        # Torch's attention is a target by its parts, or as a whole for what changes no weights.
        if method is not None and method.mergeable and isinstance(layer.module, nn.MultiheadAttention) and not bare:
            names = []
        if method is not None and not method.mergeable:
            names = [name for name in names if name not in layer.owners]
        if method is not None and not method.chooses(layer.parameter):
            names = names if bare else []
        elif method is not None and (bare or method.within()):
            names = [*names, *layer.holders(self.model, method.within())]
        return any(self._matches(path, module) for path, module in names)

    def can_adapt(self, layer: Layer) -> bool:
        """Whether its method can adapt a layer."""
        return self.method is not None and self.method.matrix(layer.module, layer.parameter) is not None

    def names(self, layer: Layer) -> bool:
        """Whether it matches the path of a layer itself, rather than of a module that has it."""
        return any(self._matches(path, layer.module) for path in layer.paths)

    def complaint(self, everything: list[Layer], taken: set[int]) -> str:
        """Why it is of no use, given the layers and the ids of those that were chosen."""
        if self.pattern is None:
            return (
                f"The model has no layer that {type(self.method).__name__} supports besides its output head: choose"
                " another method, or name the targets."
            )
        matched = [layer for layer in everything if self.matches(layer, self.method)]
        if any(id(layer) in taken and self.can_adapt(layer) for layer in matched):
            return f"The pattern {self.pattern!r} is left without a layer by those before it: put it in front of them."
        if matched:
            return (
                f"The pattern {self.pattern!r} selects no layer to adapt, only excluded or unsupported ones such as"
                f" {matched[0].path} ({type(matched[0].module).__name__})."
            )
        others = [layer for layer in everything if self.matches(layer, None)]
        if others and self.method is not None:
            return (
                f"The pattern {self.pattern!r} selects only layers that have no parameter for"
                f" {type(self.method).__name__}, such as {others[0].path} ({type(others[0].module).__name__})."
            )
        return f"The pattern {self.pattern!r} matches no layer; {self._hint([layer.path for layer in everything])}."

    def _hint(self, paths: list[str]) -> str:
        if not isinstance(self.pattern, str):
            return f"the paths are such as {', '.join(map(repr, paths[-3:]))}"
        if _REGEX.search(self.pattern):
            return f"if it is a regular expression, pass re.compile({self.pattern!r})"
        names = sorted({*paths, *(path.rpartition(".")[2] for path in paths)})
        near = difflib.get_close_matches(self.pattern, names, n=3, cutoff=0.5) or names[-3:]
        return f"near it are {', '.join(map(repr, near))}"


def _matcher(pattern: Pattern | None, model: nn.Module, method: Method | None) -> Callable[[str, nn.Module], bool]:
    if pattern is None:
        if method is not None and (default := method.default(model)) is not None:
            return default
        head = _output_head(model)
        return lambda path, module: module is not head and path.rpartition(".")[2] not in _HEAD_NAMES
    if isinstance(pattern, str):
        if "*" in pattern:
            pattern = _glob(pattern)
        else:
            name, suffix = pattern, f".{pattern}"
            return lambda path, module: path == name or path.endswith(suffix)
    if isinstance(pattern, re.Pattern):
        full = pattern.fullmatch
        return lambda path, module: full(path) is not None
    if isinstance(pattern, type):
        kind = pattern
        return lambda path, module: isinstance(module, kind)
    if callable(pattern) and not isinstance(pattern, nn.Module):
        return pattern
    shown = f"A {type(pattern).__name__}" if isinstance(pattern, nn.Module) else repr(pattern)
    raise TargetError(f"{shown} is no pattern: use a name, a glob, a compiled regex, a type or f(path, module).")


def _glob(pattern: str) -> re.Pattern[str]:
    """`*` stands for anything within one name, `**` for anything; `**.` also for nothing, where a name begins.

    What a wildcard stands for is never tried again once the text after it is found: the first place for that leaves
    most to the others. So the time is at most the square of a path's length, whatever the pattern.
    """
    first, *rest = re.split(r"((?:^|(?<=\.))\*{2,}\.|\*{2,})", pattern)
    regex = _within_names(first, last=not rest)
    for wildcard, text in zip(rest[::2], rest[1::2], strict=True):
        if text is rest[-1]:
            regex += (r"(?:.*\.)?" if wildcard.endswith(".") else ".*") + _within_names(text, last=True)
        else:
            any_ = r"(?:.*?\.)??" if wildcard.endswith(".") else ".*?"
            regex += f"(?>{any_}{_within_names(text, last=False)})"
    return re.compile(regex)


def _within_names(text: str, last: bool) -> str:
    """The expression for a part of a glob without `**`, the last part or one before it."""
    first, *rest = map(re.escape, text.split("*"))
    found = [rf"(?>[^.]*?{part})" for part in rest]
    if last and rest:
        found[-1] = rf"[^.]*{rest[-1]}"
    return first + "".join(found)


def _output_head(model: nn.Module) -> object:
    """The layer that a transformers model calls its output embeddings, where there is one."""
    get = getattr(model, "get_output_embeddings", None)
    head = get() if callable(get) else None
    return head.base if isinstance(head, Adapted) else head


def as_rules(method: Any, targets: Patterns | None) -> dict[Pattern | None, Any]:
    """A method and its targets, or a mapping of patterns to methods, as one mapping."""
    if isinstance(method, Mapping):
        if targets is not None:
            raise TargetError("Targets are given twice: in the mapping of patterns to methods and as targets=.")
        if not method:
            raise TargetError("There are no patterns in the mapping of patterns to methods: name some.")
        return dict(method)
    if targets is None:
        return {None: method}
    patterns = _as_list(targets)
    if not patterns:
        raise TargetError("There are no targets in the list: name some, or leave targets= out for every layer.")
    return dict.fromkeys(patterns, method)


def _as_list(patterns: Patterns | None) -> list[Pattern]:
    if patterns is None:
        return []
    if isinstance(patterns, Mapping):
        raise TargetError("A mapping of patterns to methods takes the place of the method, not of the patterns.")
    if isinstance(patterns, Iterable) and not isinstance(patterns, (str, type, nn.Module)):
        return list(patterns)
    return [patterns]
