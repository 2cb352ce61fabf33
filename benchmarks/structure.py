"""Time to inject, toggle and eject adapters, by layer, in small and very large models."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import Tensor, nn

import adapters
from adapters import LoRA, Patch
from benchmarks.harness import DEVICE, Ratio, Row, Timed, Times, median, ratio, report, rounds

try:
    import refiners.fluxion.layers as ancestor  # type: ignore[import-not-found]
    from refiners.fluxion.adapters.lora import LinearLora, LoraAdapter  # type: ignore[import-not-found]
except ImportError:
    ancestor = None

SIZE, RANK = 16, 4
COUNTS = (100, 1000, 10_000)
PEERS_UP_TO = 1000  # They take minutes beyond that.

# Steps and the upper bound of each: relative to constructing the layers, or in microseconds.
PER_LAYER = {"inject": 1.0, "inject a second": 1.0, "eject": 0.2}
IN_ALL = {"toggle": 50.0, "scale": 50.0, "first use": None, "use": 50.0}


def flat(count: int) -> nn.Module:
    """Layers in one container."""
    return nn.Sequential(*(nn.Linear(SIZE, SIZE) for _ in range(count)))


def nested(count: int) -> nn.Module:
    """Stages of ten blocks, each with two parts of five layers."""

    def part() -> nn.Module:
        return nn.ModuleDict({name: nn.Linear(SIZE, SIZE) for name in ("q", "k", "v", "up", "down")})

    def stage() -> nn.Module:
        return nn.ModuleList(nn.ModuleDict({"first": part(), "second": part()}) for _ in range(min(10, count // 10)))

    return nn.ModuleList(stage() for _ in range(max(1, count // 100)))


# Builder of each model, and PEFT's target_modules.
LAYOUTS: dict[str, tuple[Callable[[int], nn.Module], Any]] = {
    "flat": (flat, r"\d+"),
    "nested": (nested, ["q", "k", "v", "up", "down"]),
}


class Beside(nn.Module):
    """Layer with a handwritten LoRA bypass."""

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self._modules["base"] = base
        self._parameters["down"], self._parameters["up"] = nn.Parameter(down), nn.Parameter(up)


def inject_by_hand(model: nn.Module) -> list[tuple[nn.Module, str, Beside]]:
    """Inject by hand: every A and B in its own buffer, and a node in place of each layer."""
    gc.disable()
    try:
        slots = [
            (parent, key, child)
            for parent in model.modules()
            for key, child in parent._modules.items()
            if isinstance(child, nn.Linear)
        ]
        shape = (len(slots), RANK, SIZE)
        downs = torch.empty(shape, device=DEVICE).uniform_(-1, 1).mul_(SIZE**-0.5).unbind()
        ups = torch.zeros(shape, device=DEVICE).mT.unbind()
        made = []
        for (parent, key, child), down, up in zip(slots, downs, ups, strict=True):
            parent._modules[key] = node = Beside(child, down, up)
            made.append((parent, key, node))
        return made
    finally:
        gc.enable()


def eject_by_hand(made: list[tuple[nn.Module, str, Beside]]) -> None:
    for parent, key, node in made:
        parent._modules[key] = node._modules["base"]


def here(timed: Timed, build: Callable[[], nn.Module]) -> None:
    """Round of this library."""
    model = timed("constructing", build).to(DEVICE)
    one = timed("inject", lambda: adapters.inject(model, LoRA(rank=RANK), nn.Linear, name="one"))
    two = timed("inject a second", lambda: adapters.inject(model, LoRA(rank=RANK), nn.Linear, name="two"))

    def use() -> None:
        with adapters.use(model, "two"):
            pass

    timed("first use", use)
    timed("toggle", lambda: _set(one, enabled=False))
    timed("scale", lambda: _set(one, scale=0.5))
    timed("use", use)
    two.eject()
    timed("eject", one.eject)


def _set(patch: Patch, **values: Any) -> None:
    for name, value in values.items():
        setattr(patch, name, value)


def by_hand(timed: Timed, build: Callable[[], nn.Module]) -> None:
    model = build().to(DEVICE)
    made = timed("inject by hand", lambda: inject_by_hand(model))
    timed("eject by hand", lambda: eject_by_hand(made))


def with_peft(timed: Timed, build: Callable[[], nn.Module], targets: Any) -> None:
    model, config = build().to(DEVICE), peft.LoraConfig(r=RANK, target_modules=targets)
    wrapped = timed("inject PEFT", lambda: peft.get_peft_model(model, config, "one"))
    timed("inject a second PEFT", lambda: wrapped.add_adapter("two", config))
    timed("toggle PEFT", wrapped.base_model.disable_adapter_layers)
    wrapped.base_model.enable_adapter_layers()

    def scale() -> None:
        for layer in wrapped.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale("one", 0.5)

    timed("scale PEFT", scale)
    timed("use PEFT", lambda: wrapped.set_adapter("two"))
    timed("eject PEFT", wrapped.unload)


def with_refiners(timed: Timed, count: int) -> None:
    chain = ancestor.Chain(ancestor.Linear(SIZE, SIZE) for _ in range(count))

    def inject(name: str) -> list[Any]:
        made = []
        for layer, parent in list(chain.walk(ancestor.Linear)):
            lora = LinearLora(name, SIZE, SIZE, rank=RANK)
            made.append(LoraAdapter(layer, lora).inject(parent))
        return made

    made = timed("inject refiners", lambda: inject("one"))
    timed("eject refiners", lambda: [adapter.eject() for adapter in made])


def measure(layout: str, count: int) -> Times:
    """All steps for one model, interleaved; beside the largest, also inject for ten of the smallest."""
    builder, targets = LAYOUTS[layout]

    def build() -> nn.Module:
        return builder(count)

    def one_round(timed: Timed) -> None:
        here(timed, build)
        by_hand(timed, build)
        if count <= PEERS_UP_TO:
            with_peft(timed, build, targets)
            if ancestor is not None and layout == "flat":
                with_refiners(timed, count)
        else:
            small = [builder(COUNTS[0]).to(DEVICE) for _ in range(10)]
            timed("inject ten small", lambda: [adapters.inject(model, LoRA(rank=RANK), nn.Linear) for model in small])

    seconds = 4.0 if count <= PEERS_UP_TO else 20.0
    return rounds(one_round, seconds, least=3, collect=True, warm=count > COUNTS[0])


def compare(layout: str, count: int) -> list[Row]:
    times = measure(layout, count)
    rows: list[Row] = [_row("construct", layout, count) | {"µs per layer": 1e6 * median(times, "constructing") / count}]
    for step, limit in PER_LAYER.items():
        row = _row(step, layout, count) | {"target": {"/ constructing": limit}}
        rows.append(row | {"µs per layer": 1e6 * median(times, step) / count} | _ratios(times, step))
    for step, limit in IN_ALL.items():
        row = _row(step, layout, count) | {"target": {"µs in all": limit} if limit else None}
        rows.append(row | {"µs in all": 1e6 * median(times, step)} | _ratios(times, step))
    if "inject ten small" in times:  # 1 if the time by layer does not depend on the model.
        span = count / COUNTS[0]
        pairs = zip(times["inject"], times["inject ten small"], strict=True)
        exponent = Ratio.of([math.log(10 * large / small) / math.log(span) for large, small in pairs])
        rows.append(
            {"step": f"exponent of inject, {COUNTS[0]} to {count:,}", "model": layout, "target": {"exponent": 1.05}}
            | {"exponent": exponent}
        )
    return rows


def _row(step: str, layout: str, count: int) -> Row:
    return {"step": step, "model": f"{layout}, {count:,}"}


def _ratios(times: Times, step: str) -> Row:
    row: Row = {"/ constructing": ratio(times, step, "constructing") if step in PER_LAYER else None}
    return row | {f"/ {peer}": ratio(times, step, f"{step} {peer}") for peer in ("by hand", "PEFT", "refiners")}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [row for layout in LAYOUTS for count in COUNTS for row in compare(layout, count)]
    report(
        "structure",
        f"Changing models of linear layers with {SIZE} features, LoRA of rank {RANK}: the time of this library, and its"
        " ratio to constructing the layers, to the least by hand, and to peers; medians and quartiles of rounds."
        " Scaling and using are `set_scale` for each layer and `set_adapter` in PEFT.",
        rows,
    )


if __name__ == "__main__":
    main()
