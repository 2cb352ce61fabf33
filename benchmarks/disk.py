"""Merging an adapter into a checkpoint from disk to disk, next to copying the file."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import adapters
import weights
from benchmarks.harness import Row, Timed, median, ratio, report, rounds

LAYERS, WIDTH, RANK = 62, 4096, 16  # 2.08 GB in half precision
ROUNDS = 6  # each order of the three ways once
SHARED_MEMORY = Path("/dev/shm")

# In a separate process, as peak memory never falls: peak memory beyond that of the imports, in bytes.
PEAK = """
import sys, torch, adapters, benchmarks.disk as disk
from pathlib import Path
def status(name):
    return int(Path("/proc/self/status").read_text().split(name)[1].split()[0]) * 1024
torch.set_num_threads(1)
folder = Path(sys.argv[1])
adapter = disk.weights.read_adapter(folder / "adapter.safetensors")
torch.randn(64, 64) @ torch.randn(64, 64)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS:")
getattr(disk, sys.argv[2])(folder)
print(status("VmHWM:") - before)
"""


def make(folder: Path, dtype: torch.dtype) -> None:
    """Checkpoint of 2 GB, and LoRA for every layer of it."""
    generator = torch.Generator().manual_seed(0)
    count = LAYERS * 2 // dtype.itemsize
    block = torch.randn(WIDTH, WIDTH, generator=generator).to(dtype)
    tensors = {f"layers.{number}.proj.weight": block.roll(number) for number in range(count)}
    save_file(tensors, folder / "base.safetensors", {"format": "pt"})
    factors = {
        f"layers.{number}.proj": weights.LayerWeights(
            "lora",
            {"rank": RANK, "alpha": float(RANK), "dropout": 0.0, "rslora": False, "bias": False},
            {"lora_A": torch.randn(RANK, WIDTH, generator=generator), "lora_B": torch.randn(WIDTH, RANK) * 0.01},
        )
        for number in range(count)
    }
    weights.write_adapter(weights.AdapterFile(factors), folder / "adapter.safetensors", "fluxion")


def cp(folder: Path) -> None:
    """Copy the file."""
    subprocess.run(["cp", folder / "base.safetensors", folder / "out.safetensors"], check=True)


def here(folder: Path) -> None:
    """Merge from disk to disk."""
    adapters.merge_files(folder / "base.safetensors", {folder / "adapter.safetensors": 0.7}, folder / "out.safetensors")


def naive(folder: Path) -> None:
    """Load everything, merge, and save everything, in one thread."""
    tensors = load_file(folder / "base.safetensors")
    for name, layer in weights.read_adapter(folder / "adapter.safetensors").layers.items():
        weight = tensors[f"{name}.weight"]
        wide = weight.float().addmm_(layer.tensors["lora_B"].float() * 0.7, layer.tensors["lora_A"].float())
        tensors[f"{name}.weight"] = wide.to(weight.dtype)
    save_file(tensors, folder / "out.safetensors", {"format": "pt"})


def peak(folder: Path, way: str) -> float:
    (folder / "out.safetensors").unlink(missing_ok=True)
    done = subprocess.run([sys.executable, "-c", PEAK, str(folder), way], capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def measured(place: Path | None, dtype: torch.dtype, synced: bool) -> Row:
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder = Path(name)
        make(folder, dtype)

        def until_there(way: Callable[[Path], None]) -> None:
            """Time until the file is written, and synced if that is waited for."""
            way(folder)
            if synced:
                subprocess.run(["sync", folder / "out.safetensors"], check=True)

        orders = itertools.cycle(itertools.permutations((cp, here, naive)))

        def one_round(timed: Timed) -> None:
            for way in next(orders):  # The time of allocations depends on what was freed before.
                (folder / "out.safetensors").unlink(missing_ok=True)
                if synced:
                    subprocess.run(["sync"], check=True)
                timed(way.__name__, partial(until_there, way))

        times = rounds(one_round, seconds=0.0, least=ROUNDS, warm=True)
        size = WIDTH * WIDTH * dtype.itemsize
        most = 1 / (0.65 if synced else 0.8)
        row: Row = {
            "what": f"{str(dtype).removeprefix('torch.')}, {'on disk, synced' if synced else 'in shared memory'}",
            "target": {"/ cp": most, "memory, in tensors": 4.0},
            "GB/s": (folder / "base.safetensors").stat().st_size / median(times, "here") / 1e9,
        }
        row |= {f"/ {other}": ratio(times, "here", other) for other in ("cp", "naive")}
        return row | {"memory, in tensors": peak(folder, "here") / size, "of naive": peak(folder, "naive") / size}


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    if SHARED_MEMORY.is_dir() and shutil.disk_usage(SHARED_MEMORY).free > 8e9:
        rows += [measured(SHARED_MEMORY, dtype, synced=False) for dtype in (torch.bfloat16, torch.float32)]
    rows += [measured(None, dtype, synced=True) for dtype in (torch.bfloat16, torch.float32)]
    report(
        "disk",
        f"Merging LoRA of rank {RANK} for every layer into a checkpoint of 2.08 GB, in layers of {WIDTH} features;"
        " its time as a multiple of that of cp, and of that of loading all, merging and saving all. The memory is the"
        " most beyond that of the imports and the adapter.",
        rows,
    )


if __name__ == "__main__":
    main()
