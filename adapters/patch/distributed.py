"""Tensor parallelism: layers and their adapters divided by columns or rows, with as many messages as the layers alone.

Megatron's scheme (arXiv:1909.08053) adds up, over the processes, the gradient of the input of a layer divided by its
outputs, and the output of one divided by its inputs. What an adapter of low rank has to have added up, `rank` numbers
for each token, goes along in the same message.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from functools import partial
from typing import Any, cast

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.nn import functional

from adapters.activation.mixed_batch import Rows
from adapters.errors import PatchStateError, RowsError, TargetError
from adapters.layers.sharded import is_sharded
from adapters.lowrank.linear import Pair, joined
from adapters.methods.core.method import Branch
from adapters.runtime.adapted_layer import AdaptedLayer, is_merged_as

# What transformers calls them too, in the plans that its models bring.
_NAMES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
    "embedding_rowwise": partial(RowwiseParallel, input_layouts=Replicate()),
}


def parallel_plan(model: nn.Module, plan: Mapping[str, ParallelStyle | str]) -> dict[str, ParallelStyle]:
    """The plan for `parallelize_module` of a model with patches in it, given that of the model without.

    Each adapted layer is divided as the plan says, and its adapters with it: beside a layer divided by its outputs B is
    divided by them, and beside one divided by its inputs A is. In `forward` and in `backward` there are as many
    messages as without adapters.

    Args:
        model: The patched model.
        plan: Patterns of paths, as `parallelize_module` takes them, and styles. `"colwise"` and `"rowwise"` may stand
            for `ColwiseParallel()` and `RowwiseParallel()`, and so may the names in the `tp_plan` of a model of
            transformers.

    Raises:
        TargetError: A pattern matches nothing; or an adapted layer has a style, or an adapter, that cannot be divided:
            these are the two styles in their default layouts, `nn.Linear`, and LoRA without dropout.

    Example:
        >>> plan = {"up_proj": ColwiseParallel(), "down_proj": RowwiseParallel()}
        >>> parallelize_module(model, mesh, adapters.parallel_plan(model, plan))
    """
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        modules.setdefault(path, module)  # A node comes before the layer in it, which has the same path.
    found: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        made = _NAMES[style]() if isinstance(style, str) and style in _NAMES else style
        if not isinstance(made, ParallelStyle):
            raise TargetError(f"{made!r} is no style for {pattern!r}: choose from {', '.join(_NAMES)}, or give one.")
        paths = [path for path in modules if _matches(path, pattern)]
        if not paths:
            raise TargetError(f"The pattern {pattern!r} of the plan matches no module of the model: check the path.")
        for path in paths:
            module = modules[path]
            found[path] = Divided(path, module, made) if isinstance(module, AdaptedLayer) else made
    return found


def _matches(path: str, pattern: str) -> bool:
    names, patterns = path.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatch, names, patterns))


class Divided(ParallelStyle):
    """A layer and its adapters, divided by outputs or by inputs."""

    def __init__(self, path: str, node: AdaptedLayer, style: ParallelStyle) -> None:
        super().__init__()
        layouts = (getattr(style, "input_layouts", None), getattr(style, "output_layouts", None))
        by_outputs = isinstance(style, ColwiseParallel) and layouts == ((Replicate(),), (Shard(-1),))
        by_inputs = isinstance(style, RowwiseParallel) and layouts == ((Shard(-1),), (Replicate(),))
        if not (by_outputs or by_inputs) or not style.use_local_output:  # type: ignore[attr-defined]
            raise TargetError(
                f"{path} has adapters, and {type(style).__name__} with these layouts has no form for them."
            )
        if type(node.base).forward is not nn.Linear.forward:
            raise TargetError(
                f"{path} is a {type(node.base).__name__}, and only an nn.Linear is divided with adapters."
            )
        for branch in node.branches:
            if branch.method.thin(branch) is None or getattr(branch.method, "dropout", False):
                raise TargetError(f"{path} has {branch.method}, which cannot be divided: use LoRA without dropout.")
        self.style, self.by_outputs = style, by_outputs

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        node = cast(AdaptedLayer, module)
        self.style._apply(node.base, device_mesh)  # Which also does for the layer after `eject`.
        placements: list[Placement] = [Replicate(), Shard(0)] if self.by_outputs else [Shard(1), Replicate()]
        for branch in node.branches:
            thin = branch.method.thin(branch)
            if thin is not None:
                _divide(thin.down, device_mesh, placements[0])
                _divide(thin.up, device_mesh, placements[1])
        run = _by_outputs if self.by_outputs else _by_inputs
        node.divide(_Run(cast(Callable[..., Tensor], run.apply), device_mesh))
        return node


def _divide(layer: nn.Linear, mesh: DeviceMesh, placement: Placement) -> None:
    weight = distribute_tensor(layer.weight.detach(), mesh, [placement])
    layer._parameters["weight"] = nn.Parameter(weight, layer.weight.requires_grad)


class _Run:
    """What a divided node computes."""

    def __init__(self, run: Callable[..., Tensor], mesh: DeviceMesh) -> None:
        self._run, self._mesh = run, mesh

    def __deepcopy__(self, memo: Any) -> _Run:
        return self  # A mesh is of processes, which are not copied.

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # A compiled graph would keep the choice.
    def __call__(self, node: AdaptedLayer, x: Tensor) -> Tensor:
        chosen = node.chosen()
        if isinstance(chosen, Rows):
            raise RowsError(
                "Layers that are divided on several processes cannot have an adapter for each row: use one."
            )
        if not is_merged_as(node, chosen):
            raise PatchStateError(f"{node.path} is divided, and another choice is merged into it: unmerge first.")
        pairs = [_pair(branch, scale) for branch, scale in chosen[len(node.merged) :]]
        down, up, scale, _ = joined(pairs, x.dtype) if pairs else (None, None, 1.0, 0.0)
        weight, bias = (_own(node.base._parameters[name]) for name in ("weight", "bias"))
        return self._run(x, weight, bias, down, up, scale, self._mesh.get_group())


def _pair(branch: Branch, scale: float) -> Pair:
    thin = branch.method.thin(branch)
    if thin is None:
        raise PatchStateError(f"{branch.method} beside a divided layer was changed: it is not LoRA any more.")
    factor = 1.0 if thin.multiply is None else thin.multiply.scale
    return cast(Tensor, _own(thin.down.weight)), cast(Tensor, _own(thin.up.weight)), scale * factor, 0.0


def _own(tensor: Tensor | None) -> Tensor | None:
    """The part of this process."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _sum(one: Tensor, other: Tensor | None, group: Any) -> tuple[Tensor, Tensor | None]:
    """Two tensors of as many tokens, added up over all processes in one message."""
    packed = one if other is None else torch.cat((one, other), -1)
    packed = packed.contiguous()
    torch.distributed.all_reduce(packed, group=group)
    return (packed, None) if other is None else packed.split((one.shape[-1], other.shape[-1]), -1)


class _by_outputs(torch.autograd.Function):  # noqa: N801
    """`x Wᵀ + b + s (x Aᵀ) Bᵀ`, where W, b and B are the rows of this process."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Any, up: Any, scale: float, group: Any
    ) -> Any:
        small = None if down is None else functional.linear(x, down)
        output = functional.linear(x, weight, bias)
        ctx.save_for_backward(x, weight, down, up, small)
        ctx.scale, ctx.group = scale, group
        return output if small is None else output + functional.linear(small, up) * scale

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, down, up, small = ctx.saved_tensors
        inner = None if up is None else grad @ up * ctx.scale
        outer, inner = _sum(grad @ weight, inner, ctx.group)
        if inner is not None:
            outer = outer + inner @ down
        return (*_grads(ctx, grad, outer, x, inner, small), None, None)


class _by_inputs(torch.autograd.Function):  # noqa: N801
    """The same, where x, W and A are the columns of this process."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Any, up: Any, scale: float, group: Any
    ) -> Any:
        small = None if down is None else functional.linear(x, down)
        output, small = _sum(functional.linear(x, weight), small, group)
        ctx.save_for_backward(x, weight, down, up, small)
        ctx.scale = scale
        output = output if small is None else output + functional.linear(small, up) * scale
        return output if bias is None else output + bias

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, down, up, small = ctx.saved_tensors
        inner = None if up is None else grad @ up * ctx.scale
        outer = grad @ weight if inner is None else grad @ weight + inner @ down
        return (*_grads(ctx, grad, outer, x, inner, small), None, None)


def _grads(
    ctx: Any, grad: Tensor, outer: Tensor, x: Tensor, inner: Tensor | None, small: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, W, b, A and B, of which `outer` is that of x and `inner` that of `x Aᵀ`."""
    _, for_weight, for_bias, for_down, for_up, *_ = ctx.needs_input_grad
    flat = grad.flatten(0, -2)
    return (
        outer,
        flat.t() @ x.flatten(0, -2) if for_weight else None,
        flat.sum(0) if for_bias else None,
        inner.flatten(0, -2).t() @ x.flatten(0, -2) if for_down and inner is not None else None,
        flat.t() @ small.flatten(0, -2) * ctx.scale if for_up and small is not None else None,
    )
