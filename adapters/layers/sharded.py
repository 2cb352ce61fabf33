"""Sharded tensors: the `DTensor`s of FSDP2 and of tensor parallelism.

Nothing of torch.distributed is imported here: where there is such a tensor, that has been done.
"""

from __future__ import annotations

import gc
import pickle
import sys
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeGuard, TypeVar, cast

import torch
from torch import Tensor, nn

from adapters.errors import PatchStateError, TargetError

T = TypeVar("T")


class Weight(Protocol):
    """A parameter of a module, and the path of the module."""

    module: nn.Module
    parameter: str

    @property
    def path(self) -> str: ...


def is_sharded(tensor: Any) -> TypeGuard[Any]:
    """Whether a tensor is a `DTensor`, of which this process has a shard, or a replica."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gather(tensor: Tensor) -> Tensor:
    """A tensor with all of its shards. A collective call: every process has to make it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has in full, sharded over the device mesh of another one of its shape."""
    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    return distribute(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def on_rank_zero(tensors: Iterable[Tensor], run: Callable[[], T]) -> T:
    """Call a function on rank 0 alone if one of the tensors is sharded, and on every rank otherwise.

    Every rank returns the result of rank 0, or raises its error.
    """
    shared = next(filter(is_sharded, tensors), None)
    if shared is None:
        return run()
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = run()
        except Exception as error:
            outcome[1] = error
    outcome = _broadcast_object(outcome, shared.device)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def _broadcast_object(value: Any, device: torch.device) -> Any:
    """The object of rank 0 on every rank.

    Unlike after `broadcast_object_list`, a process may exit at once: a thread of gloo releases a tensor some time after
    it was sent, and if it is the last to hold it, it waits for the interpreter, and aborts a process that is exiting.
    """
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    size = torch.tensor([len(data)], device=device)
    _broadcast(size)
    if torch.distributed.get_rank() == 0:
        _broadcast(data)
        return value
    _broadcast(data := data.new_empty(int(size)))
    return pickle.loads(bytes(data.tolist()))


def _broadcast(tensor: Tensor) -> None:
    work = torch.distributed.broadcast(tensor, src=0, async_op=True)
    work.wait()
    _sent.append(work)


_sent: deque[Any] = deque(maxlen=2)  # The last broadcasts, which keep their tensors.


# FSDP and DDP


def units(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that `fully_shard` was called with."""
    if not _is_distributed() or (module := sys.modules.get("torch.distributed.fsdp")) is None:
        return []
    return [part for part in model.modules() if isinstance(part, module.FSDPModule)]


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reshard(model: nn.Module) -> None:
    """Shard the parameters of FSDP again: between two steps, the outermost unit has gathered copies.

    An optimizer must not update a copy, and what is written to it is lost.
    """
    for unit in units(model):
        unit.reshard()  # type: ignore[operator]


def check_before(weights: Iterable[Weight], trainable: bool) -> None:
    """Raise unless new adapters of some weights compute, and train, as in one process.

    FSDP and DDP average the gradients of the parameters that they were given, and know no others.

    Args:
        weights: The weights that are to have one.
        trainable: Whether the adapters are to be trained.

    Raises:
        TargetError: A weight is sharded already, or gradients are averaged by what does not know the adapters.
    """
    weights = list(weights)
    parameters = [weight.module._parameters.get(weight.parameter) for weight in weights]
    if not _is_distributed() or not (trainable or any(map(is_sharded, parameters))):
        return
    sharded, wrapped = _managed_modules()
    for weight, parameter in zip(weights, parameters, strict=True):
        key = id(weight.module)
        if trainable and key in wrapped:
            raise TargetError(
                f"{weight.path} is in DistributedDataParallel, which would not average the gradients of an adapter that"
                " comes later: inject before it is wrapped."
            )
        if trainable and key in sharded:
            raise TargetError(
                f"{weight.path} is sharded by fully_shard, which would not average the gradients of an adapter that"
                " comes later: inject before fully_shard."
            )
        if is_sharded(parameter) and (trainable or key not in sharded or parameter.device_mesh.ndim > 1):
            raise TargetError(
                f"{weight.path} is sharded by parallelize_module: inject or load before that, and give it the plan of"
                " adapters.parallel_plan."
            )


def _managed_modules() -> tuple[set[int], set[int]]:
    """The ids of all modules of this process that are managed by FSDP, and by DDP.

    A module does not know that it is wrapped: DDP sets nothing on modules or parameters, has no registry, and its hooks
    are out of sight in C++. So its instances are looked for among all objects, by their exact classes, which takes a
    third of the time of `isinstance`.
    """
    ddp = _with_subclasses(nn.parallel.DistributedDataParallel)
    module = sys.modules.get("torch.distributed.fsdp")
    fsdp = set() if module is None else _with_subclasses(module.FSDPModule, module.FullyShardedDataParallel)
    managing, objects = ddp | fsdp, gc.get_objects()
    managers = [(made, kind) for made, kind in zip(objects, map(type, objects), strict=True) if kind in managing]
    sharded, wrapped = (
        {id(part) for made, kind in managers if kind in kinds for part in made.modules()} for kinds in (fsdp, ddp)
    )
    return sharded, wrapped


def _with_subclasses(*kinds: type) -> set[type]:
    found = set(kinds)
    for kind in kinds:
        found |= _with_subclasses(*type.__subclasses__(kind))
    return found


def check_trained(model: nn.Module, named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise a PatchStateError for a trainable parameter in a unit of FSDP that does not average its gradients."""
    inside = {id(parameter) for unit in units(model) for parameter in unit.parameters()}
    for name, parameter in named:
        if parameter.requires_grad and id(parameter) in inside and not is_sharded(parameter):
            raise PatchStateError(
                f"{name} is in a module given to fully_shard, which was told to ignore it or did not know it yet, and"
                " would not average its gradients: inject before fully_shard, and leave it out of ignored_params."
            )


def check_leaving(nodes: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise a PatchStateError for a node that is a unit of FSDP: nothing else would gather the shards of the layer."""
    for path, node in nodes:
        if node in units(node):
            raise PatchStateError(
                f"{path} was given to fully_shard together with its adapter, and one cannot be without the other: give"
                " it the block around the layer, or the layer itself, if patches are to be ejected."
            )
