"""Cost of LoRA in one linear layer, relative to the frozen layer alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import adapters
from adapters import LoRA
from benchmarks.harness import DEVICE, Row, in_turns, ratio, repeated, report

try:
    import refiners.fluxion.layers as ancestor  # type: ignore[import-not-found]
    from refiners.fluxion.adapters.lora import LinearLora, LoraAdapter  # type: ignore[import-not-found]
except ImportError:
    ancestor = None

RANK = 16
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """Layer of `size` features, with a number of tokens; the target is relative to the layer alone."""

    size: int
    tokens: int
    dtype: torch.dtype
    backward: bool = False
    patches: int = 1
    target: float | None = None

    def __str__(self) -> str:
        what = "forward and backward" if self.backward else "forward"
        several = f", {self.patches} patches" if self.patches > 1 else ""
        return f"{self.size:,}², {self.tokens:,} token{'s' * (self.tokens > 1)}, {what}{several}"


FP32, BF16 = torch.float32, torch.bfloat16
CASES = [
    Case(1024, 512, FP32, target=1.06),
    Case(1024, 512, BF16, target=1.10),
    Case(1024, 512, FP32, backward=True, target=1.10),
    Case(1024, 512, BF16, backward=True, target=1.15),
    Case(1024, 1, FP32, target=1.15),
    Case(64, 1, FP32, target=2.0),
    Case(4096, 16, FP32),
    Case(1024, 512, FP32, patches=4),
    Case(1024, 512, BF16, patches=4),
]
GPU_CASES = [
    Case(1024, 1, BF16, target=1.15),
    Case(4096, 8192, BF16, target=1.10),
    Case(4096, 8192, BF16, backward=True, target=1.15),
    Case(4096, 8192, BF16, patches=4),
]


class Naive(nn.Module):
    """Naive LoRA."""

    def __init__(self, base: nn.Linear, scale: float = 1.0) -> None:
        super().__init__()
        self.base, self.scale = base, scale
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * self.up(self.down(x))


class Fused(torch.autograd.Function):
    """Minimal LoRA: two thin products, added in place; x and x Aᵀ are saved for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, down: Tensor, up: Tensor) -> Tensor:
        thin = x @ down.T
        ctx.save_for_backward(x, thin, weight, down, up)
        return torch.addmm(bias, x, weight.T).addmm_(thin, up.T)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, thin, weight, down, up = ctx.saved_tensors
        (gradient,) = gradients
        inner = gradient @ up
        return (gradient @ weight).addmm_(inner, down), None, None, inner.T @ x, gradient.T @ thin


def by_hand(base: nn.Linear, rank: int) -> Layer:
    """`Fused` with the scale in B; without gradients only its forward."""
    dtype, device = base.weight.dtype, base.weight.device
    down = nn.Parameter(torch.randn(rank, base.in_features, dtype=dtype, device=device))
    up = nn.Parameter(torch.zeros(base.out_features, rank, dtype=dtype, device=device))

    def run(x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return cast(Tensor, Fused.apply(x, base.weight, base.bias, down, up))
        return F.linear(x, base.weight, base.bias).addmm_(x @ down.T, up.T)

    return run


def with_peft(base: nn.Linear, count: int, autocast: bool) -> Layer:
    """PEFT's layer, whose adapters are in float32 with `autocast`, as by default."""
    model, config = nn.Sequential(base), peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["0"])
    wrapped = peft.get_peft_model(model, config, "0", autocast_adapter_dtype=autocast)
    for number in range(1, count):
        wrapped.add_adapter(str(number), config, autocast_adapter_dtype=autocast)
    wrapped.base_model.set_adapter([str(number) for number in range(count)])
    return cast(Layer, wrapped.base_model.model[0])


def with_refiners(case: Case) -> Layer:
    about = {"device": DEVICE, "dtype": case.dtype}
    chain = ancestor.Chain(ancestor.Linear(case.size, case.size, **about).requires_grad_(False))
    loras = [LinearLora(str(number), case.size, case.size, rank=RANK, **about) for number in range(case.patches)]
    LoraAdapter(chain[0], *loras).inject(chain)
    return cast(Layer, chain[0])


def with_patches(base: nn.Linear, count: int) -> Layer:
    model = nn.Sequential(base)
    for number in range(count):
        adapters.inject(model, LoRA(rank=RANK), nn.Linear, name=str(number))
    return model[0]


def layers(case: Case) -> dict[str, Layer]:
    """Layer alone, and with each implementation of LoRA."""

    def base() -> nn.Linear:
        return nn.Linear(case.size, case.size, device=DEVICE, dtype=case.dtype).requires_grad_(False)

    found: dict[str, Layer] = {
        "nn.Linear": base(),
        "here": with_patches(base(), case.patches),
        "by hand": by_hand(base(), RANK * case.patches),
        "PEFT": with_peft(base(), case.patches, autocast=False),
    }
    if case.dtype is not FP32:
        found["PEFT, float32 adapters"] = with_peft(base(), case.patches, autocast=True)
    if ancestor is not None:
        found["refiners"] = with_refiners(case)
    if case.patches == 1:
        found["naive"] = Naive(base()).to(DEVICE, case.dtype)
    return found


def step(case: Case, layer: Layer) -> Callable[[], None]:
    """Run the forward pass of a layer, and the backward pass to its input if the case has one."""
    x = torch.randn(case.tokens, case.size, dtype=case.dtype, device=DEVICE, requires_grad=case.backward)
    gradient = torch.randn_like(x)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def forward_backward() -> None:
        layer(x).backward(gradient)

    return forward_backward if case.backward else forward


def compare(case: Case, seconds: float = 6.0) -> Row:
    """Row of the table."""
    runs = max(1, 20_000_000 // (case.tokens * case.size**2))
    times = in_turns({name: repeated(step(case, layer), runs) for name, layer in layers(case).items()}, seconds)
    target = {"here / by hand": 1.05} if case.patches > 1 else {"here": case.target} if case.target else None
    row: Row = {"case": str(case), "dtype": str(case.dtype).removeprefix("torch."), "target": target}
    row |= {name: ratio(times, name, "nn.Linear") for name in times if name != "nn.Linear"}
    return row | {"here / by hand": ratio(times, "here", "by hand")}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    report(
        "layer",
        f"Time of a linear layer with LoRA of rank {RANK}, as a multiple of the frozen layer alone; medians and"
        " quartiles of rounds. Backwards is to the input and the adapters. By hand the products are added in place, and"
        " several patches are one of their rank in all.",
        [compare(case) for case in (GPU_CASES if DEVICE.type == "cuda" else CASES)],
    )


if __name__ == "__main__":
    main()
