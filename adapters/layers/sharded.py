"""Tensors that several processes have in parts: the `DTensor`s of FSDP2 and of tensor parallelism.

Nothing of them is imported here: where there is such a tensor, that has been done.
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


class Held(Protocol):
    """A parameter of a module, and the path of that."""

    module: nn.Module
    parameter: str

    @property
    def path(self) -> str: ...


def is_sharded(tensor: Any) -> TypeGuard[Any]:
    """Whether a tensor is a `DTensor`, of which this process has a part, or a copy that others have too."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def gather(tensor: Tensor) -> Tensor:
    """A tensor with all of its parts. All processes have to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def shard_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor that every process has whole, in the parts that another one of its shape is in."""
    if is_sharded(tensor) or not is_sharded(like):
        return tensor
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    return distribute(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def on_rank_zero(tensors: Iterable[Tensor], run: Callable[[], T]) -> T:
    """Do something in one process if tensors are in parts on several; all go on when it is done, or raise its error."""
    shared = next(filter(is_sharded, tensors), None)
    if shared is None:
        return run()
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = run()
        except Exception as error:
            outcome[1] = error
    outcome = _of_the_first(outcome, shared.device)
    if outcome[1] is not None:
        raise outcome[1]
    return cast(T, outcome[0])


def _of_the_first(value: Any, device: torch.device) -> Any:
    """What the first process has, in all of them.

    It is `broadcast_object_list`, after which a process may end at once. A thread of gloo lets go of a tensor some time
    after it was sent, and if nothing else has it by then, it waits for Python, and aborts a process that is ending.
    """
    data = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8).to(device)
    size = torch.tensor([len(data)], device=device)
    _send(size)
    if torch.distributed.get_rank() == 0:
        _send(data)
        return value
    _send(data := data.new_empty(int(size)))
    return pickle.loads(bytes(data.tolist()))


def _send(tensor: Tensor) -> None:
    work = torch.distributed.broadcast(tensor, src=0, async_op=True)
    work.wait()
    _sent.append(work)


_sent: deque[Any] = deque(maxlen=2)  # What was sent last, and has to stay.


# FSDP2


def units(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that `fully_shard` was called with."""
    if not _are_several() or (module := sys.modules.get("torch.distributed.fsdp")) is None:
        return []
    return [part for part in model.modules() if isinstance(part, module.FSDPModule)]


def _are_several() -> bool:
    """Whether this is one of several processes that work together."""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def reshard(model: nn.Module) -> None:
    """Let parameters be in parts, as they are outside of `forward`: between two steps, the outermost unit has copies.

    A copy is not what an optimizer has to change, and what is written to it is lost.
    """
    for unit in units(model):
        unit.reshard()  # type: ignore[operator]


def _averaging() -> tuple[type[nn.Module], ...]:
    """The classes of what averages gradients."""
    module = sys.modules.get("torch.distributed.fsdp")
    of_fsdp = () if module is None else (module.FSDPModule, module.FullyShardedDataParallel)
    return (nn.parallel.DistributedDataParallel, *of_fsdp)


def check_before(layers: Iterable[Held], trainable: bool) -> None:
    """Raise unless new adapters compute, and train, what they would in one process.

    FSDP and DDP average the gradients of the parameters that they were given, and know no others.

    Args:
        layers: Those that are to have one.
        trainable: Whether they are to be trained.

    Raises:
        TargetError: The layers are in parts already, or gradients are averaged by what does not know the adapters.
    """
    layers = list(layers)
    parts = [is_sharded(layer.module._parameters.get(layer.parameter)) for layer in layers]
    if not _are_several() or not (trainable or any(parts)):
        return
    # A module does not know what it is in, so all that there is in this process is looked at.
    wrappers = [made for made in gc.get_objects() if issubclass(type(made), _averaging())]
    ddp = nn.parallel.DistributedDataParallel
    inside, wrapped = (
        {id(part) for outer in wrappers if isinstance(outer, ddp) == is_ddp for part in outer.modules()}
        for is_ddp in (False, True)
    )
    for layer, is_part in zip(layers, parts, strict=True):
        key, weight = id(layer.module), cast(Any, layer.module._parameters.get(layer.parameter))
        if trainable and key in wrapped:
            raise TargetError(
                f"{layer.path} is in DistributedDataParallel, which would not average the gradients of an adapter that"
                " comes later: inject before it is wrapped."
            )
        if trainable and key in inside:
            raise TargetError(
                f"{layer.path} is sharded by fully_shard, which would not average the gradients of an adapter that"
                " comes later: inject before fully_shard."
            )
        if is_part and (trainable or key not in inside or weight.device_mesh.ndim > 1):
            raise TargetError(
                f"{layer.path} is in parts on several processes: inject or load before parallelize_module, and give"
                " that the plan of adapters.parallel_plan."
            )


def check_trained(model: nn.Module, named: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Raise a PatchStateError for a parameter to train that no unit of FSDP knows: nothing averages its gradients."""
    inside = {id(parameter) for unit in units(model) for parameter in unit.parameters()}
    for name, parameter in named:
        if parameter.requires_grad and id(parameter) in inside and not is_sharded(parameter):
            raise PatchStateError(
                f"{name} is in a module given to fully_shard, which was told to ignore it or did not know it yet, and"
                " would not average its gradients: inject before fully_shard, and leave it out of ignored_params."
            )


def check_leaving(nodes: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise a PatchStateError for a node that is a unit of FSDP: without it, nothing would gather the layer's parts."""
    for path, node in nodes:
        if node in units(node):
            raise PatchStateError(
                f"{path} was given to fully_shard together with its adapter, and one cannot be without the other: give"
                " it the block around the layer, or the layer itself, if patches are to be ejected."
            )
