"""Training that goes on after one of its processes was killed, as `torchrun --max-restarts` runs it."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed.worker import STEPS, patched, shard, train, trained

EVERY, KILLED_AT = 5, 12


def main(folder: Path, kill: bool) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model, patch = patched("chain")
    shard(model, mesh)
    optimizer = torch.optim.Adam(patch.parameters(), lr=1e-2)
    done = max((int(path.name) for path in folder.glob("*") if (path / ".metadata").exists()), default=0)
    if done:
        state = trained(model, optimizer)
        checkpoint.load(state, checkpoint_id=folder / str(done))
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    for step in range(done, STEPS):
        if kill and step == KILLED_AT and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        [loss] = train(model, patch, False, mesh, [step], optimizer)
        if dist.get_rank() == 0:
            with (folder / "losses").open("a") as file:
                file.write(f"{os.environ['TORCHELASTIC_RESTART_COUNT']} {step} {loss!r}\n")
        if (step + 1) % EVERY == 0:
            checkpoint.save(trained(model, optimizer), checkpoint_id=folder / str(step + 1))
    patch.save_pretrained(folder / "adapter")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2] == "kill")
