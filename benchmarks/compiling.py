"""Recompilations of `torch.compile` when patches change."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import peft
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import adapters
from adapters import LoRA
from benchmarks.harness import DEVICE, Ratio, Row, report

SIZE, RANK, ROWS, LAYERS = 64, 4, 4, 3

# A library puts the model in a state and calls it there. The first state of each change is compiled before.
Call = Callable[..., object]
State = Callable[[Call], object]
Changes = Mapping[str, Sequence[State]]
NAMES = ("one", "two", "three")
USED = (["one"], ["two"], ["one", "three"], [])
MIXED = (["one", "two"] * 2, ["two", "two", "one", "one"], ["one", "three", "three", "two"], ["three"] * 4)


class Counter:
    """Backend of `torch.compile` that runs graphs eagerly, and counts them and their runs."""

    def __init__(self) -> None:
        self.made = self.run = 0

    def __call__(self, graph: GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        self.made += 1

        def forward(*args: Any) -> Any:
            self.run += 1
            return graph.forward(*args)

        return forward


def base() -> nn.Module:
    layers = [module for _ in range(LAYERS) for module in (nn.Linear(SIZE, SIZE), nn.GELU())]
    return nn.Sequential(*layers).to(DEVICE).eval()


def in_thread(state: State, call: Call) -> None:
    """State in another thread."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(state, call).result()


def changes(
    toggled: Callable[[bool, Call], object],
    scaled: Callable[[float, Call], object],
    used: Callable[[Sequence[str], Call], object],
    swapped: Callable[[dict[str, Tensor], Call], object],
    others: Sequence[dict[str, Tensor]],
    mixed: Callable[[Sequence[str], Call], object],
) -> Changes:
    """States of each change, given how a library enters one."""
    return {
        "toggle": [partial(toggled, on) for on in (True, False, True, False)],
        "scale": [partial(scaled, scale) for scale in (1.0, 0.5, 0.25, 2.0)],
        "use in another thread": [partial(in_thread, partial(used, names)) for names in USED],
        "other values": [partial(swapped, tensors) for tensors in others],
        "mixed rows with other names": [partial(mixed, rows) for rows in MIXED],
    }


def here() -> tuple[nn.Module, Changes]:
    model = base()
    one, *_ = (adapters.inject(model, LoRA(rank=RANK), nn.Linear, name=name) for name in NAMES)
    others = [{name: torch.randn_like(tensor) for name, tensor in one.state_dict().items()} for _ in range(3)]

    def toggled(on: bool, call: Call) -> None:
        one.enabled = on
        call()

    def scaled(scale: float, call: Call) -> None:
        one.scale = scale
        call()

    def used(names: Sequence[str], call: Call) -> None:
        with adapters.use(model, *names):
            call()

    def swapped(tensors: Mapping[str, Tensor], call: Call) -> None:
        one.load_state_dict(tensors)
        call()

    def mixed(rows: Sequence[str], call: Call) -> None:
        with adapters.use(model, rows=rows):
            call()

    return model, changes(toggled, scaled, used, swapped, others, mixed)


def with_peft() -> tuple[nn.Module, Changes]:
    config = peft.LoraConfig(r=RANK, target_modules=["0", "2", "4"], init_lora_weights=False)
    model = peft.get_peft_model(base(), config, NAMES[0])
    for name in NAMES[1:]:
        model.add_adapter(name, config)
    model.eval()
    state = peft.get_peft_model_state_dict(model, adapter_name=NAMES[0])
    others = [{name: torch.randn_like(tensor) for name, tensor in state.items()} for _ in range(3)]

    def toggled(on: bool, call: Call) -> None:
        (model.base_model.enable_adapter_layers if on else model.base_model.disable_adapter_layers)()
        call()

    def scaled(scale: float, call: Call) -> None:
        for layer in model.modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                layer.set_scale(NAMES[0], scale)
        call()

    def used(names: Sequence[str], call: Call) -> None:
        model.base_model.set_adapter(list(names))
        call()

    def swapped(tensors: dict[str, Tensor], call: Call) -> None:
        peft.set_peft_model_state_dict(model, tensors, NAMES[0])
        call()

    def mixed(rows: Sequence[str], call: Call) -> None:
        call(adapter_names=rows)

    return model, changes(toggled, scaled, used, swapped, others, mixed)


def count(library: Callable[[], tuple[nn.Module, Changes]], change: str) -> tuple[int, float, int]:
    """Counts for a change: graphs in the first state, recompiled graphs for the other states, and states."""
    torch._dynamo.reset()
    counter = Counter()
    model, states = library()
    compiled = torch.compile(model, backend=counter)
    x = torch.randn(ROWS, SIZE, device=DEVICE)

    def call(**kwargs: Any) -> None:
        with torch.no_grad():  # In this thread only.
            compiled(x, **kwargs)

    first, *others = states[change]
    first(call)
    first(call)
    counter.run = 0
    first(call)
    divided, made = counter.run, counter.made
    for state in others:
        state(call)
    return divided, counter.made - made, len(others)


def compare(change: str) -> Row:
    """Row of the table."""
    row: Row = {"change": change, "target": {"new graphs here": 0}}
    for name, library in (("here", here), ("PEFT", with_peft)):
        divided, made, states = count(library, change)
        row["changes"] = str(states)
        row |= {f"new graphs {name}": Ratio.exact(made), f"graphs of one call {name}": divided}
    return row


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # Above its limit of recompilations, torch falls back to eager, which would count as none.
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)
    report(
        "compiling",
        f"A compiled model of {LAYERS} linear layers with three LoRA: into how many graphs a call is divided (1 is"
        " whole), and how many are made anew for some changes after calls in a first state.",
        [compare(change) for change in here()[1]],
    )


if __name__ == "__main__":
    main()
