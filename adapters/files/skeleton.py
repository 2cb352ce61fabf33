"""`Skeleton`, the layers of a checkpoint without values: known by names and shapes, of zeros that take no memory."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import weights
from adapters.files.resolve.path_index import CheckpointWeight
from adapters.files.resolve.resolved import ResolvedAdapter, ResolvedLayer
from adapters.layers.kinds import CONVOLUTIONS, TRANSPOSED, Conv1D
from adapters.methods import METHODS
from adapters.targets.target import Target
from weights.disk.header import TensorInfo

_EMBEDDING = re.compile(r"(.*_)?embed(ding)?s?(_tokens|_positions|_in|_out)?|wte|wpe|shared")
_KERNELS = {3: 0, 4: 1, 5: 2}  # Dimensions of the weight, and the place of the class.


class Skeleton:
    """The layers of a checkpoint, made from the names and shapes of its tensors.

    Most layers hold an output in a row of their weight. Those of GPT-2 and transposed convolutions hold one in a
    column, and the weight alone does not show it. The bias does, which has a number for each output, unless the weight
    is square. Then it is that of layers of the same name (`h.0.attn.c_proj` and `h.0.mlp.c_proj`) that shows it; or
    that of all others, where these agree.
    """

    def __init__(self, infos: Mapping[str, TensorInfo]) -> None:
        self.infos = infos
        self._parameters: dict[str, dict[str, TensorInfo]] = {}
        for name, info in infos.items():
            path, _, parameter = name.rpartition(".")
            self._parameters.setdefault(path, {})[parameter] = info
        self._in_columns: dict[tuple[str, int], set[bool]] = {}
        for path in self._parameters:
            shown = self._shown(path)
            if shown is not None:
                dims = len(self._parameters[path]["weight"].shape)
                self._in_columns.setdefault((_name(path), dims), set()).add(shown)
                self._in_columns.setdefault(("", dims), set()).add(shown)

    def model(self) -> nn.Module:
        """All layers, as children of one module by their dotted paths."""
        root = nn.Module()
        for path in self._parameters:
            if path:
                root._modules[path] = self.layer(path)
        return root

    def targets_of(
        self, adapters: Sequence[ResolvedAdapter[CheckpointWeight]], read: Callable[[str], Tensor] | None = None
    ) -> list[list[ResolvedLayer[Target]]]:
        """The layers of resolved adapters, each with a target of the skeleton in place of the weight.

        Adapters of one weight share the target. Its layer is an embedding if any of them is for one.

        Args:
            adapters: Adapters that were resolved in the same checkpoint.
            read: Reads a tensor of the checkpoint by name, for buffers.
        """
        contents: dict[str, list[weights.LayerWeights]] = {}
        buffers: dict[str, set[str]] = {}
        for adapter in adapters:
            for weight, content, _ in adapter.layers:
                contents.setdefault(weight.module, []).append(content)
                method = METHODS.get(content.method)
                more = content.tensors.keys() - {weight.parameter} if method and method.files_have_buffers else ()
                buffers.setdefault(weight.module, set()).update(more)
        layers = {path: self.layer(path, buffers[path], some) for path, some in contents.items()}
        for path, layer in layers.items():
            for name in sorted(buffers[path]):
                if read is not None and f"{path}.{name}" in self.infos:
                    layer.register_buffer(name, read(f"{path}.{name}"))
        known: dict[CheckpointWeight, Target] = {}
        for adapter in adapters:
            for weight, *_ in adapter.layers:
                if weight not in known:
                    known[weight] = alone(layers[weight.module], weight.parameter, weight.path)
        return [
            [ResolvedLayer(known[weight], content, name) for weight, content, name in adapter.layers]
            for adapter in adapters
        ]

    def layer(
        self, path: str, buffers: Collection[str] = (), content: Iterable[weights.LayerWeights] = ()
    ) -> nn.Module:
        """A layer for the tensors at a path.

        Args:
            path: The path of the module.
            buffers: The names of its tensors that are no parameters, which are left out.
            content: The adapters of its weight, which show whether that is an embedding.
        """
        parameters = {name: info for name, info in self._parameters[path].items() if name not in buffers}
        layer = self._made(path, parameters, content)
        for name, info in parameters.items():
            zero = torch.zeros((), dtype=info.dtype).expand(info.shape)  # A method may start at a copy of it.
            layer._parameters[name] = nn.Parameter(zero, requires_grad=False)
        return layer

    def _made(
        self, path: str, parameters: Mapping[str, TensorInfo], content: Iterable[weights.LayerWeights]
    ) -> nn.Module:
        if "weight" not in parameters:
            return nn.Module()
        shape, bias = parameters["weight"].shape, "bias" in parameters
        where: Any = {"device": "meta"}
        if len(shape) == 1 or (bias and shape == parameters["bias"].shape):
            return nn.LayerNorm(shape, bias=bias, **where)
        if len(shape) == 2:
            if self._has_columns(path):
                return Conv1D(shape[1], shape[0])
            if not bias and _is_embedding(path, shape, content):
                return nn.Embedding(*shape, **where)
            return nn.Linear(shape[1], shape[0], bias=bias, **where)
        if len(shape) in _KERNELS:
            kinds: tuple[Any, ...] = TRANSPOSED if self._has_columns(path) else CONVOLUTIONS
            kind, kernel = kinds[_KERNELS[len(shape)]], shape[2:]
            if kinds is CONVOLUTIONS:
                return kind(shape[1], shape[0], kernel, bias=bias, **where)
            groups = parameters["bias"].shape[0] // shape[1]
            return kind(shape[0], shape[1] * groups, kernel, groups=groups, **where)
        return nn.Module()

    def _shown(self, path: str) -> bool | None:
        """Whether a layer has outputs in columns, where its bias shows it."""
        weight, bias = self._parameters[path].get("weight"), self._parameters[path].get("bias")
        if weight is None or bias is None or len(weight.shape) < 2 or len(bias.shape) != 1 or 0 in weight.shape:
            return None
        outputs, (rows, columns, *kernel) = bias.shape[0], weight.shape
        if outputs == rows:
            return None if outputs == columns else False
        in_columns = outputs % columns == 0 if kernel else outputs == columns  # A transposed one may have groups.
        return in_columns or None

    def _has_columns(self, path: str) -> bool:
        if "bias" not in self._parameters[path]:
            return False
        if (shown := self._shown(path)) is not None:
            return shown
        dims = len(self._parameters[path]["weight"].shape)
        return (self._in_columns.get((_name(path), dims)) or self._in_columns.get(("", dims))) == {True}


def alone(layer: nn.Module, parameter: str, path: str) -> Target:
    """The target for a weight of a layer that no model has."""
    return Target(layer, parameter, [path], [], [], None)


def _name(path: str) -> str:
    """The last name in a path that is no number."""
    return next((name for name in reversed(path.split(".")) if not name.isdecimal()), "")


def _is_embedding(path: str, shape: Sequence[int], content: Iterable[weights.LayerWeights]) -> bool:
    """Whether a weight is looked up by rows: by the tensors there are for it, or else by its name."""
    tensors = {name: tensor for layer in content for name, tensor in layer.tensors.items()}
    if any("embedding" in name for name in tensors):
        return True
    if "lora_A" in tensors and shape[0] != shape[1]:
        return tensors["lora_A"].shape[-1:] == (shape[0],)
    return _EMBEDDING.fullmatch(path.rpartition(".")[2]) is not None
