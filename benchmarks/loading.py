"""Time to load an adapter for 500 layers, and then many more."""

from __future__ import annotations

import gc
import tempfile
import warnings
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
from benchmarks.harness import Row, Timed, median, ratio, report, rounds

LAYERS, SIZE, RANK = 500, 1024, 16
ROUNDS, PATCHES = 7, 30


def model() -> nn.Module:
    """Skeleton of layers, under names like those of models."""
    layers = [nn.ModuleDict({"q_proj": nn.Linear(SIZE, SIZE, device="meta")}) for _ in range(LAYERS)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)}).to_empty(device="cpu")


def by_hand(folder: Path) -> list[Tensor]:
    """Minimal loading: every tensor in its own memory."""
    return [tensor.clone() for tensor in load_file(folder / "adapter_model.safetensors").values()]


def first(folder: Path) -> Row:
    """One adapter, interleaved."""
    ours, theirs = model(), model()

    def one_round(timed: Timed) -> None:
        result = timed("by hand", lambda: by_hand(folder))
        del result
        patch = timed("here", lambda: adapters.load(ours, folder, name="one"))
        patch.eject()
        del patch
        gc.collect()
        wrapped = timed("PEFT", lambda: peft.PeftModel.from_pretrained(theirs, folder))
        wrapped.unload()

    times = rounds(one_round, least=ROUNDS, collect=True)
    target = {"/ by hand": 2.0, "/ PEFT": 0.1}
    row: Row = {"what": "the first", "target": target, "ms": 1e3 * median(times, "here")}
    return row | {f"/ {name}": ratio(times, "here", name) for name in ("by hand", "PEFT")}


def many(folder: Path) -> list[Row]:
    """Many adapters into one model, with as many kept by hand, so that none reuses warm memory."""
    base = model()
    held: list[object] = []

    def one_round(timed: Timed) -> None:
        held.append(timed("by hand", lambda: by_hand(folder)))
        held.append(timed("here", lambda: adapters.load(base, folder, name=f"patch {len(held)}")))

    times = rounds(one_round, seconds=0.0, least=PATCHES - 1, collect=True)
    rows: list[Row] = []
    for what, part in ((f"the 2nd to 6th of {PATCHES}", slice(0, 5)), (f"the last 5 of {PATCHES}", slice(-5, None))):
        some = {name: taken[part] for name, taken in times.items()}
        rows.append({"what": what, "ms": 1e3 * median(some, "here"), "/ by hand": ratio(some, "here", "by hand")})
    return rows


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = peft.LoraConfig(r=RANK, target_modules=["q_proj"])
        peft.get_peft_model(model(), settings).save_pretrained(folder)
        report(
            "loading",
            f"Loading LoRA of rank {RANK} for {LAYERS} layers of {SIZE} features, 65.6 MB, written by PEFT; medians"
            " and quartiles of rounds. By hand is `load_file` and a copy of each tensor.",
            [*many(folder), first(folder)],
        )


if __name__ == "__main__":
    main()
