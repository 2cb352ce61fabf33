"""Merging LoRA into the weights of many layers in memory."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn

import adapters
from adapters import LoRA
from benchmarks.harness import DEVICE, Row, Timed, median, ratio, report, rounds

LAYERS, SIZE, RANK = 144, 1024, 16
TARGETS = {torch.float32: 1.1, torch.bfloat16: 3.0}


def model(dtype: torch.dtype) -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(SIZE, SIZE, bias=False, device=DEVICE, dtype=dtype) for _ in range(LAYERS)))


def products(dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Factors B and A of each layer."""
    about = {"device": DEVICE, "dtype": dtype}
    return [(torch.zeros(SIZE, RANK, **about), torch.randn(RANK, SIZE, **about)) for _ in range(LAYERS)]


def in_place(weights: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Minimal merging, in place."""
    for weight, (up, down) in zip(weights, pairs, strict=True):
        weight.addmm_(up, down)


def through_float32(weights: list[Tensor], pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Merging in place without rounding before the sum, in a buffer that all layers share."""
    buffer = torch.empty(SIZE, SIZE, device=DEVICE)
    for weight, (up, down) in zip(weights, pairs, strict=True):
        weight.copy_(buffer.copy_(weight).addmm_(up.float(), down.float()))


def compare(dtype: torch.dtype, seconds: float = 15.0) -> list[Row]:
    """Rows of a dtype."""
    weights, pairs = [layer.weight.data for layer in model(dtype)], products(dtype)
    ours = model(dtype)
    wrapped = peft.get_peft_model(
        model(dtype), peft.LoraConfig(r=RANK, target_modules=r"\d+"), autocast_adapter_dtype=False
    )

    def one_round(timed: Timed) -> None:
        timed("addmm_", lambda: in_place(weights, pairs))
        if dtype is not torch.float32:
            timed("addmm_ in float32", lambda: through_float32(weights, pairs))
        patch = adapters.inject(ours, LoRA(rank=RANK), nn.Linear)
        timed("merge", patch.merge)
        timed("unmerge", patch.unmerge)
        timed("merge_and_eject", patch.merge_and_eject)
        timed("PEFT", wrapped.merge_adapter)
        timed("unmerge PEFT", wrapped.unmerge_adapter)

    times = rounds(one_round, seconds)
    rows: list[Row] = []
    for call in ("merge", "unmerge", "merge_and_eject"):
        row: Row = {"call": call, "dtype": str(dtype).removeprefix("torch."), "ms": 1e3 * median(times, call)}
        row["target"] = None if call == "unmerge" else {"/ addmm_": TARGETS[dtype]}
        row |= {f"/ {name}": ratio(times, call, name) for name in ("addmm_", "addmm_ in float32")}
        row["/ PEFT"] = ratio(times, call, "unmerge PEFT" if call == "unmerge" else "PEFT")
        rows.append(row)
    for name in ("addmm_ in float32", "PEFT"):
        if name in times:
            row = {"call": f"{name} itself", "dtype": str(dtype).removeprefix("torch.")}
            rows.append(row | {"ms": 1e3 * median(times, name), "/ addmm_": ratio(times, name, "addmm_")})
    return rows


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = [row for dtype in TARGETS for row in compare(dtype)]
    report(
        "merging",
        f"Merging LoRA of rank {RANK} into {LAYERS} linear layers of {SIZE:,} features: the time of this library, and"
        " its ratio to adding the products in place by hand, in the dtype of the weights or through one buffer of"
        " float32, and to `merge_adapter` of PEFT; medians and quartiles of rounds.",
        rows,
    )


if __name__ == "__main__":
    main()
