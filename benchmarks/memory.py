"""Peak memory of a training step of a layer with LoRA, in tensors of the size of its output."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import peft
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import adapters
from adapters import LoRA
from benchmarks.harness import DEVICE, Ratio, Row, report
from benchmarks.layer import BF16, FP32, RANK, Naive, by_hand

try:
    import refiners.fluxion.layers as ancestor  # type: ignore[import-not-found]
    from refiners.fluxion.adapters.lora import LinearLora, LoraAdapter  # type: ignore[import-not-found]
except ImportError:
    ancestor = None

SIZE, TOKENS = 1024, 2048
FEW, MANY = 2, 6  # Each further layer adds the memory that it saves for backward.
TARGET = 2.3

Model = Callable[[Tensor], Tensor]
Make = Callable[[nn.Sequential], Model]


def peak(run: Callable[[], object]) -> int:
    """Peak of allocated bytes while a function runs, beyond those allocated before."""
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    kineto = profiled.profiler.kineto_results  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in kineto.events() if e.name() == "[memory]")
    return max(accumulate(size for _, size in changes))


def activations(make: Make, count: int, dtype: torch.dtype) -> float:
    """Peak of the second step of consecutive layers, given the input and the gradient of the output."""
    base = nn.Sequential(*(nn.Linear(SIZE, SIZE, device=DEVICE, dtype=dtype) for _ in range(count)))
    model = make(base.requires_grad_(False))
    x = torch.randn(TOKENS, SIZE, device=DEVICE, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(x)

    def step() -> None:
        x.grad = None
        model(x).backward(gradient)

    step()
    x.grad = None
    return peak(step) / (x.numel() * x.element_size())


def with_patch(dropout: float) -> Make:
    def make(base: nn.Sequential) -> Model:
        adapters.inject(base, LoRA(rank=RANK, dropout=dropout), nn.Linear)
        return base

    return make


def with_peft(dropout: float, autocast: bool) -> Make:
    def make(base: nn.Sequential) -> Model:
        config = peft.LoraConfig(r=RANK, lora_dropout=dropout, target_modules=r"\d+")
        return peft.get_peft_model(base, config, autocast_adapter_dtype=autocast).base_model.model

    return make


def with_refiners(base: nn.Sequential) -> Model:
    about = {"device": DEVICE, "dtype": base[0].weight.dtype}
    chain = ancestor.Chain(ancestor.Linear(SIZE, SIZE, **about).requires_grad_(False) for _ in base)
    for layer in list(chain):
        LoraAdapter(layer, LinearLora("one", SIZE, SIZE, rank=RANK, **about)).inject(chain)
    return chain


def naive(base: nn.Sequential) -> Model:
    return nn.Sequential(*map(Naive, base)).to(DEVICE, base[0].weight.dtype)


def hand(base: nn.Sequential) -> Model:
    layers = [by_hand(layer, RANK) for layer in base]

    def run(x: Tensor) -> Tensor:
        for layer in layers:
            x = layer(x)
        return x

    return run


def compare(dtype: torch.dtype, dropout: float) -> list[Row]:
    """Two rows of the table: peak of one layer, and memory that each further layer saves."""
    makes: dict[str, Make] = {
        "nn.Linear": lambda base: base,
        "here": with_patch(dropout),
        "PEFT": with_peft(dropout, autocast=False),
    }
    if dtype is not FP32:
        makes["PEFT, float32 adapters"] = with_peft(dropout, autocast=True)
    if not dropout:
        makes |= {"by hand": hand, "naive": naive}
        if ancestor is not None:
            makes["refiners"] = with_refiners
    name = str(dtype).removeprefix("torch.") + (", dropout" if dropout else "")
    one: Row = {"memory": "peak of one layer", "case": name, "target": {"here": TARGET}}
    kept: Row = {"memory": "kept by each of more", "case": name}
    for way, make in makes.items():
        one[way] = Ratio.exact(activations(make, 1, dtype))
        few, many = (activations(make, count, dtype) for count in (FEW, MANY))
        kept[way] = Ratio.exact((many - few) / (MANY - FEW))
    return [one, kept]


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for dtype in (FP32, BF16) for dropout in (0.0, 0.1) for row in compare(dtype, dropout)]
    report(
        "memory",
        f"The most memory in use during a step, forward and backward, of linear layers of {SIZE:,} features with LoRA"
        f" of rank {RANK} on {TOKENS:,} tokens, in activations: tensors of the size of the output. Weights, the input,"
        " and the gradient of the output are there before, and not counted. By hand x and x Aᵀ are kept, and products"
        " are added in place.",
        rows,
    )


if __name__ == "__main__":
    main()
