"""Tensor parallelism: adapted layers sharded column-wise or row-wise, with as many all-reduces as the layers alone.

Megatron's scheme (arXiv:1909.08053) all-reduces the gradient of the input of a column-wise layer, whose outputs are
sharded, and the output of a row-wise one, whose inputs are. What a low-rank branch has to have reduced, `rank` numbers
for each token, goes along in the same all-reduce.
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
from adapters.lowrank.low_rank import LowRank
from adapters.methods.core.method import Branch
from adapters.runtime.adapted_layer import AdaptedLayer

# The styles by the names that the plans of transformers models have for them.
_NAMES: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": partial(ColwiseParallel, output_layouts=Replicate()),
    "embedding_rowwise": partial(RowwiseParallel, input_layouts=Replicate()),
}


def parallel_plan(model: nn.Module, plan: Mapping[str, ParallelStyle | str]) -> dict[str, ParallelStyle]:
    """The plan for `parallelize_module` of a model with patches in it, given that of the model without.

    Each adapted layer is sharded as the plan says, and its branches with it: beside a column-wise layer B is sharded
    by outputs, and beside a row-wise one A by inputs. In `forward` and in `backward` there are as many all-reduces as
    without adapters.

    Args:
        model: The patched model.
        plan: Patterns of paths, as `parallelize_module` takes them, and styles. `"colwise"` and `"rowwise"` may stand
            for `ColwiseParallel()` and `RowwiseParallel()`, and so may the names in the `tp_plan` of a model of
            transformers.

    Raises:
        TargetError: A pattern matches nothing; or an adapted layer has a style, or a branch, that cannot be sharded
            together: these are the two styles in their default layouts, `nn.Linear`, and LoRA without dropout.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))
        >>> patch = adapters.inject(model, adapters.LoRA(rank=2))
        >>> plan = adapters.parallel_plan(model, {"0": "colwise", "1": "rowwise"})
        >>> # parallelize_module(model, mesh, plan)
    """
    modules: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        modules.setdefault(path, module)  # A node comes before the layer in it, which has the same path.
    found: dict[str, ParallelStyle] = {}
    for pattern, style in plan.items():
        made = _NAMES[style]() if isinstance(style, str) and style in _NAMES else style
        if not isinstance(made, ParallelStyle):
            raise TargetError(
                f"{made!r} is no style for {pattern!r}: choose from {', '.join(_NAMES)}, or pass a ParallelStyle."
            )
        paths = [path for path in modules if _matches(path, pattern)]
        if not paths:
            raise TargetError(f"The pattern {pattern!r} of the plan matches no module of the model: check the path.")
        for path in paths:
            module = modules[path]
            found[path] = AdaptedParallel(path, module, made) if isinstance(module, AdaptedLayer) else made
    return found


def _matches(path: str, pattern: str) -> bool:
    names, patterns = path.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatch, names, patterns))


class AdaptedParallel(ParallelStyle):
    """Column-wise or row-wise style of a layer together with its branches."""

    def __init__(self, path: str, node: AdaptedLayer, style: ParallelStyle) -> None:
        super().__init__()
        layouts = (getattr(style, "input_layouts", None), getattr(style, "output_layouts", None))
        colwise = isinstance(style, ColwiseParallel) and layouts == ((Replicate(),), (Shard(-1),))
        rowwise = isinstance(style, RowwiseParallel) and layouts == ((Shard(-1),), (Replicate(),))
        if not (colwise or rowwise) or not style.use_local_output:  # type: ignore[attr-defined]
            raise TargetError(
                f"{path} has adapters, which cannot be sharded by {type(style).__name__} with these layouts: use"
                " ColwiseParallel() or RowwiseParallel()."
            )
        if type(node.base).forward is not nn.Linear.forward:
            raise TargetError(
                f"{path} is a {type(node.base).__name__}, and only an nn.Linear can be sharded with adapters: exclude"
                " it from the patch."
            )
        for branch in node.branches:
            if branch.method.low_rank(branch) is None or getattr(branch.method, "dropout", False):
                raise TargetError(f"{path} has {branch.method}, which cannot be sharded: use LoRA without dropout.")
        self.style, self.colwise = style, colwise

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        node = cast(AdaptedLayer, module)
        self.style._apply(node.base, device_mesh)  # Which also does for the layer after `eject`.
        placements: list[Placement] = [Replicate(), Shard(0)] if self.colwise else [Shard(1), Replicate()]
        for branch in node.branches:
            factors = (layer for layer in branch if isinstance(layer, nn.Linear))  # A, then B.
            for layer, placement in zip(factors, placements, strict=True):
                _shard(layer, device_mesh, placement)
        run = _Colwise if self.colwise else _Rowwise
        node.set_tensor_parallel(_ParallelForward(cast(Callable[..., Tensor], run.apply), device_mesh))
        return node


def _shard(layer: nn.Linear, mesh: DeviceMesh, placement: Placement) -> None:
    weight = distribute_tensor(layer.weight.detach(), mesh, [placement])
    layer._parameters["weight"] = nn.Parameter(weight, layer.weight.requires_grad)


class _ParallelForward:
    """Forward pass of a sharded adapted layer."""

    def __init__(self, run: Callable[..., Tensor], mesh: DeviceMesh) -> None:
        self._run, self._mesh = run, mesh

    def __deepcopy__(self, memo: Any) -> _ParallelForward:
        return self  # A mesh is of processes, which are not copied.

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # A compiled graph would keep the choice.
    def __call__(self, node: AdaptedLayer, x: Tensor) -> Tensor:
        active = node.active_branches()
        if isinstance(active, Rows):
            raise RowsError("Layers under tensor parallelism cannot run a mixed batch: choose one patch for all rows.")
        if not node.is_merged_as(active):
            raise PatchStateError(f"{node.path} is sharded, and another choice is merged into it: unmerge first.")
        updates = [_local_update(branch, scale).to(x.dtype) for branch, scale in active[len(node.merged) :]]
        update = LowRank.join(updates) if updates else None
        down, up, scale = (None, None, 1.0) if update is None else (update.down, update.up, update.scale)
        weight, bias = (_local(node.base._parameters[name]) for name in ("weight", "bias"))
        return self._run(x, weight, bias, down, up, scale, self._mesh.get_group())


def _local_update(branch: Branch, scale: float) -> LowRank:
    """The shard of this process of the update of a branch."""
    update = branch.method.low_rank(branch)
    if update is None:
        raise PatchStateError(f"{branch.method} of a sharded layer was changed: it is not LoRA any more.")
    return LowRank(cast(Tensor, _local(update.up)), cast(Tensor, _local(update.down)), update.scale * scale)


def _local(tensor: Tensor | None) -> Tensor | None:
    """The shard of this process."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def _all_reduce(one: Tensor, other: Tensor | None, group: Any) -> tuple[Tensor, Tensor | None]:
    """Two tensors of as many tokens, reduced over all processes in one all-reduce."""
    packed = one if other is None else torch.cat((one, other), -1)
    packed = packed.contiguous()
    torch.distributed.all_reduce(packed, group=group)
    return (packed, None) if other is None else packed.split((one.shape[-1], other.shape[-1]), -1)


class _Colwise(torch.autograd.Function):
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
        outer, inner = _all_reduce(grad @ weight, inner, ctx.group)
        if inner is not None:
            outer = outer + inner @ down
        return (*_grads(ctx, grad, outer, x, inner, small), None, None)


class _Rowwise(torch.autograd.Function):
    """`Σ (x Wᵀ + s (x Aᵀ) Bᵀ) + b` over processes, where x, W and A are the columns of this one."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Any, up: Any, scale: float, group: Any
    ) -> Any:
        small = None if down is None else functional.linear(x, down)
        output, small = _all_reduce(functional.linear(x, weight), small, group)
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
    """Gradients of x, W, b, A and B, given those of x, `outer`, and of `x Aᵀ`, `inner`."""
    _, for_weight, for_bias, for_down, for_up, *_ = ctx.needs_input_grad
    flat = grad.flatten(0, -2)
    return (
        outer,
        flat.t() @ x.flatten(0, -2) if for_weight else None,
        flat.sum(0) if for_bias else None,
        inner.flatten(0, -2).t() @ x.flatten(0, -2) if for_down and inner is not None else None,
        flat.t() @ small.flatten(0, -2) * ctx.scale if for_up and small is not None else None,
    )
