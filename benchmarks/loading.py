"""What it takes to load an adapter for 500 layers, and then many more."""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import adapters
from benchmarks.harness import Row, report

LAYERS, SIZE, RANK = 500, 1024, 16
ROUNDS, PATCHES = 7, 30


def model() -> nn.Module:
    """Layers without values, under names such as models have."""
    layers = [nn.ModuleDict({"q_proj": nn.Linear(SIZE, SIZE, device="meta")}) for _ in range(LAYERS)]
    return nn.ModuleDict({"layers": nn.ModuleList(layers)}).to_empty(device="cpu")


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    """How long something takes, and what comes out, which is not thrown away within that time."""
    gc.collect()
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def by_hand(folder: Path) -> list[Tensor]:
    """The least there is to do: every tensor in memory of its own."""
    return [tensor.clone() for tensor in load_file(folder / "adapter_model.safetensors").values()]


def first(folder: Path) -> list[Row]:
    """One adapter, in turns."""
    ours, theirs = model(), model()
    times: dict[str, list[float]] = {"by hand": [], "here": [], "PEFT": []}
    for _ in range(ROUNDS):
        taken, result = seconds(lambda: by_hand(folder))
        times["by hand"].append(taken)
        del result
        taken, patch = seconds(lambda: adapters.load(ours, folder, name="one"))
        times["here"].append(taken)
        patch.eject()  # type: ignore[attr-defined]
        del patch
        taken, wrapped = seconds(lambda: peft.PeftModel.from_pretrained(theirs, folder))
        times["PEFT"].append(taken)
        wrapped.unload()  # type: ignore[attr-defined]
        del wrapped
    here = statistics.median(times["here"])
    row: Row = {"what": "the first", "target": "≤ 2 × by hand, ≤ 0.1 × PEFT", "ms": here * 1e3}
    for name in ("by hand", "PEFT"):
        ratios = sorted(ours / other for ours, other in zip(times["here"], times[name], strict=True))
        row[f"/ {name}"] = statistics.median(ratios)
        row[f"quartiles / {name}"] = f"{ratios[ROUNDS // 4]:.2f} to {ratios[-1 - ROUNDS // 4]:.2f}"
    return [row]


def many(folder: Path) -> list[Row]:
    """One after the other into one model, with as many kept by hand: none gets memory that is warm already."""
    base = model()
    held: list[object] = []
    times: list[tuple[float, float]] = []
    for number in range(PATCHES):
        theirs, result = seconds(lambda: by_hand(folder))
        ours, patch = seconds(lambda number=number: adapters.load(base, folder, name=f"patch {number}"))  # type: ignore[misc]
        held += [result, patch]
        times.append((ours, theirs))
    rows: list[Row] = []
    for what, some in ((f"the 2nd to 6th of {PATCHES}", times[1:6]), (f"the last 5 of {PATCHES}", times[-5:])):
        ours = statistics.median(taken for taken, _ in some)
        rows.append(
            {"what": what, "ms": ours * 1e3, "/ by hand": statistics.median(one / other for one, other in some)}
        )
    rows[1]["target"] = "/ by hand as above"
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
            f"Loading LoRA of rank {RANK} for {LAYERS} layers of {SIZE} features, 65.6 MB, written by PEFT; medians,"
            " taken in turns. By hand is `load_file` and a copy of each tensor.",
            [*many(folder), *first(folder)],
        )


if __name__ == "__main__":
    main()
