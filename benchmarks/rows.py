"""Mixed batches in one linear layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import peft
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import adapters
from adapters import LoRA
from benchmarks.harness import DEVICE, Row, Timed, Times, median, ratio, report, rounds

ROWS, ADAPTERS, SIZE, RANK = 64, 32, 1024, 16
TARGET = 1.1
Way = Callable[[Tensor], Tensor]


def spread(order: str) -> list[int]:
    """Adapter of each row: each adapter has as many rows, grouped or shuffled."""
    numbers = torch.arange(ROWS) // (ROWS // ADAPTERS)
    return (numbers if order == "sorted" else numbers[torch.randperm(ROWS)]).tolist()


class ByHand:
    """Layer with stacked adapters, A of shape (adapters, rank, in) and B of (adapters, rank, out).

    Index tensors that depend on the rows alone are made before, once for all layers.
    """

    def __init__(self, base: nn.Linear, choice: Sequence[int]) -> None:
        about: dict[str, Any] = {"device": DEVICE, "dtype": base.weight.dtype}
        self.base = base
        self.down = torch.randn(ADAPTERS, RANK, SIZE, **about)
        self.up = torch.randn(ADAPTERS, RANK, SIZE, **about)
        self.numbers = torch.tensor(choice, device=DEVICE)
        self.is_sorted = list(choice) == sorted(choice)
        self.order = self.numbers.argsort(stable=True)
        self.inverse = self.order.argsort()
        self.counts = torch.bincount(self.numbers, minlength=ADAPTERS)

    def _sorted(self, add: Callable[[Tensor, Tensor], None], x: Tensor) -> Tensor:
        """Sort the rows, add to the outputs, and put them back in order."""
        if not self.is_sorted:
            x = x.index_select(0, self.order)
        output = self.base(x)
        add(x.flatten(0, 1), output.flatten(0, 1))
        return output if self.is_sorted else output.index_select(0, self.inverse)

    def gathered(self, x: Tensor) -> Tensor:
        """Gather A and B of each row, for one batched product."""
        down, up = self.down.index_select(0, self.numbers), self.up.index_select(0, self.numbers)
        return self.base(x).baddbmm_(x @ down.mT, up)

    def loop(self) -> Way:
        """Two products for each adapter, the second one added to its rows of the output."""
        counts = self.counts.tolist()

        def add(x: Tensor, output: Tensor) -> None:
            sizes = [len(x) // ROWS * count for count in counts]
            for part, out, down, up in zip(x.split(sizes), output.split(sizes), self.down, self.up, strict=True):
                out.addmm_(part @ down.T, up)

        return lambda x: self._sorted(add, x)

    def grouped(self) -> Way:
        """Torch's grouped matrix product."""
        ends = self.counts.cumsum(0)

        def add(x: Tensor, output: Tensor) -> None:
            offsets = (ends * (len(x) // ROWS)).int()
            output.add_(F.grouped_mm(F.grouped_mm(x, self.down.mT, offs=offsets), self.up, offs=offsets))

        return lambda x: self._sorted(add, x)


def with_peft(base: nn.Linear) -> nn.Module:
    model, config = nn.Sequential(base), peft.LoraConfig(r=RANK, target_modules=["0"])
    wrapped = peft.get_peft_model(model, config, "0", autocast_adapter_dtype=False)
    for number in range(1, ADAPTERS):
        wrapped.add_adapter(str(number), config, autocast_adapter_dtype=False)
    return cast(nn.Module, wrapped.base_model.model[0])


def measure(base: nn.Linear, ours: nn.Sequential, theirs: nn.Module, tokens: int, choice: list[int]) -> Times:
    """All ways for one assignment of rows, interleaved."""
    x = torch.randn(ROWS, tokens, SIZE, device=DEVICE, dtype=base.weight.dtype)
    hand = ByHand(base, choice)
    names = [str(number) for number in choice]
    ways: dict[str, Way] = {
        "base": base,
        "gathered bmm": hand.gathered,
        "loop": hand.loop(),
        "grouped_mm": hand.grouped(),
        "PEFT": lambda x: theirs(x, adapter_names=names),
    }

    def one_round(timed: Timed) -> None:
        for name, way in ways.items():
            timed(name, lambda way=way: way(x))  # type: ignore[misc]
        entered = adapters.use(ours, rows=names)
        timed("enter", entered.__enter__)
        timed("here", lambda: ours[0](x))
        entered.__exit__(None, None, None)

    return rounds(one_round, seconds=3.0)


def compare(dtype: torch.dtype) -> list[Row]:
    """Rows of a dtype."""

    def base() -> nn.Linear:
        return nn.Linear(SIZE, SIZE, device=DEVICE, dtype=dtype).requires_grad_(False)

    ours, theirs = nn.Sequential(base()), with_peft(base())
    for number in range(ADAPTERS):
        adapters.inject(ours, LoRA(rank=RANK), nn.Linear, name=str(number))
    found: list[Row] = []
    for tokens in (1, 16, 64):
        for order in ("sorted", "random"):
            times = measure(base(), ours, theirs, tokens, spread(order))
            best = min(("gathered bmm", "loop", "grouped_mm"), key=lambda name: median(times, name))
            row: Row = {"tokens": f"{tokens} per row", "dtype": str(dtype).removeprefix("torch."), "rows": order}
            row["target"] = {"here / best by hand": TARGET}
            row |= {name: ratio(times, name, "base") for name in times if name not in ("base", "enter")}
            row["here / best by hand"] = ratio(times, "here", best)
            found.append(row | {"µs to enter `use`": 1e6 * median(times, "enter")})
    return found


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        table = [row for dtype in (torch.float32, torch.bfloat16) for row in compare(dtype)]
    report(
        "rows",
        f"{ROWS} rows with {ADAPTERS} LoRA of rank {RANK} in one linear layer of {SIZE:,} features: the time of each"
        " way as a multiple of the layer alone; medians and quartiles of rounds. By hand what depends on the choice of"
        " rows alone, such as their order, is made before; here that is partly done by entering `use`.",
        table,
    )


if __name__ == "__main__":
    main()
