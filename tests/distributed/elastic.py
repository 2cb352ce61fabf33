"""Training that goes on after one of its processes was killed, as `torchrun --max-restarts` runs it."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from adapters import Patch
from tests.distributed.worker import STEPS, patched, shard, train, trained

EVERY, KILLED_AT = 5, 13


def run(folder: Path) -> None:
    """Train to the end; again from the last checkpoint, after one of the processes has ended the first time."""
    folder.mkdir(exist_ok=True)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    killed = folder / "killed"
    again = killed.exists()
    if not again:
        model, patch, optimizer = begun(mesh)
        for step in range(STEPS):
            note(folder, "whole", step, train(model, patch, False, mesh, [step], optimizer))
        patch.save_pretrained(folder / "whole")
    model, patch, optimizer = begun(mesh)
    done = max((int(path.name) for path in folder.glob("*") if (path / ".metadata").exists()), default=0)
    if done:
        state = trained(model, optimizer)
        checkpoint.load(state, checkpoint_id=folder / str(done))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in range(done, STEPS):
        if step == KILLED_AT and not again and dist.get_rank() == 1:
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        note(folder, "again" if again else "first", step, train(model, patch, False, mesh, [step], optimizer))
        if (step + 1) % EVERY == 0:
            checkpoint.save(trained(model, optimizer), checkpoint_id=folder / str(step + 1))
    patch.save_pretrained(folder / "adapter")


def begun(mesh: DeviceMesh) -> tuple[nn.Module, Patch, Any]:
    model, patch = patched("chain")
    shard(model, mesh)
    return model, patch, torch.optim.Adam(patch.parameters(), lr=1e-2)


def note(folder: Path, run: str, step: int, losses: list[float]) -> None:
    """In one process, of which all compute the same."""
    if dist.get_rank() == 0:
        with (folder / "losses").open("a") as file:
            file.write(f"{run} {step} {losses[0]!r}\n")
