"""Cost of each method in one linear layer, here and in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn

import adapters
from adapters import (
    BOFT,
    C3A,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    DeLoRA,
    DoRA,
    FourierFT,
    GLoRA,
    GraLoRA,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    Method,
    MiSS,
    RandLoRA,
    RoAd,
    SHiRA,
    VBLoRA,
    VeRA,
)
from benchmarks.harness import DEVICE, Row, in_turns, ratio, report

SIZE = 1024
TOKENS = 64

# Equal hyperparameters on both sides, otherwise PEFT's defaults.
PAIRS: list[tuple[Method, Callable[..., Any]]] = [
    (AdaLoRA(rank=12), partial(peft.AdaLoraConfig, init_r=12, lora_alpha=12, total_step=1)),
    (BOFT(block_size=4), partial(peft.BOFTConfig, boft_block_size=4)),
    (C3A(block_size=256), partial(peft.C3AConfig, block_size=256)),
    (DeLoRA(rank=8), partial(peft.DeloraConfig, r=8)),
    (DoRA(rank=8), partial(peft.LoraConfig, r=8, use_dora=True)),
    (FourierFT(), peft.FourierFTConfig),
    (GLoRA(rank=8), partial(peft.GloraConfig, r=8)),
    (GraLoRA(rank=32), partial(peft.GraloraConfig, r=32)),
    (HiRA(rank=32), partial(peft.HiraConfig, r=32)),
    (HRA(rank=8), partial(peft.HRAConfig, r=8)),
    (IA3(), partial(peft.IA3Config, feedforward_modules=[])),
    (LoHa(rank=8), partial(peft.LoHaConfig, r=8)),
    (LoKr(rank=8), partial(peft.LoKrConfig, r=8)),
    (LoRA(rank=8), partial(peft.LoraConfig, r=8)),
    (MiSS(rank=64), partial(peft.MissConfig, r=64)),
    (OFT(block_size=32), partial(peft.OFTConfig, oft_block_size=32)),
    (RandLoRA(rank=32), partial(peft.RandLoraConfig, r=32)),
    (RoAd(), peft.RoadConfig),
    (SHiRA(rank=32), partial(peft.ShiraConfig, r=32)),
    (VBLoRA(), partial(peft.VBLoRAConfig, num_vectors=256)),
    (VeRA(rank=256), partial(peft.VeraConfig, r=256)),
]


def compare(method: Method, configure: Callable[..., Any]) -> Row:
    """Row of the table."""
    plain = nn.Sequential(nn.Linear(SIZE, SIZE)).to(DEVICE).requires_grad_(False)
    ours, theirs = (nn.Sequential(nn.Linear(SIZE, SIZE)).to(DEVICE) for _ in range(2))
    adapters.inject(ours, method)
    wrapped = peft.get_peft_model(theirs, configure(target_modules=["0"]))
    layers = {"here": ours[0], "PEFT": wrapped.base_model.model[0], "nn.Linear": plain[0]}
    row: Row = {"method": type(method).__name__}
    for name, run in (("forward", forward), ("forward and backward", forward_backward)):
        x = torch.randn(TOKENS, SIZE, device=DEVICE, requires_grad=run is forward_backward)
        times = in_turns({library: partial(run, layer, x) for library, layer in layers.items()}, seconds=2.0)
        row |= {f"{name} / {library}": ratio(times, "here", library) for library in ("PEFT", "nn.Linear")}
    return row


def forward(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def forward_backward(layer: nn.Module, x: Tensor) -> None:
    layer(x).sum().backward()


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report(
        "methods",
        f"Time of a linear layer of {SIZE} features with each method, for {TOKENS} tokens, and its ratio to PEFT and to"
        " the layer alone; medians and quartiles of rounds.",
        [compare(*pair) for pair in PAIRS],
    )


if __name__ == "__main__":
    main()
