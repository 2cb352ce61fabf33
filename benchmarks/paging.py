"""A thousand adapters in files, fifty of which fit the budget: time to use one that is not in the model."""

from __future__ import annotations

import random
import tempfile
import warnings
from collections import OrderedDict
from pathlib import Path

import peft
import torch
from torch import nn

import adapters
from benchmarks.harness import Ratio, Row, Timed, median, ratio, report, rounds
from benchmarks.memory import peak

LAYERS, SIZE, RANK = 8, 64, 4
COUNT, FITTING = 1000, 50
TARGETS = {"/ load and eject": 1.25, "/ PEFT": 0.5}
MOST = {"peak / budget": 1.1}


def model() -> nn.Sequential:
    blocks = (nn.Sequential(OrderedDict(q_proj=nn.Linear(SIZE, SIZE))) for _ in range(LAYERS))
    return nn.Sequential(*blocks).requires_grad_(False)


def written(folder: Path) -> tuple[dict[str, Path], int]:
    """PEFT files of adapters by name, and the size of each one's tensors in bytes."""
    base = model()
    patch = adapters.inject(base, adapters.LoRA(rank=RANK))
    sources = {str(number): patch.save_pretrained(folder / str(number)) for number in range(COUNT)}
    return sources, sum(tensor.nbytes for tensor in patch.state_dict().values())


class Peft:
    """Paging by hand in PEFT: the oldest adapter is evicted."""

    def __init__(self, sources: dict[str, Path]) -> None:
        self.here = [*sources][:FITTING]
        self.model = peft.PeftModel.from_pretrained(model(), sources[self.here[0]], self.here[0])
        for name in self.here[1:]:
            self.model.load_adapter(sources[name], name)

    def exchange(self, name: str, source: Path) -> None:
        self.model.delete_adapter(self.here.pop(0))
        self.model.load_adapter(source, name)
        self.model.set_adapter(name)
        self.here.append(name)


def times(sources: dict[str, Path], budget: int) -> list[Row]:
    """Time to enter a block, with the adapter loaded on demand and with it resident."""
    library, other, theirs = adapters.Library(model(), sources, budget=budget), model(), Peft(sources)
    here = [adapters.load(other, sources[name]) for name in [*sources][:FITTING]]

    def by_hand(name: str) -> None:
        here.pop(0).eject()
        here.append(adapters.load(other, sources[name], name=name))

    def use(name: str) -> None:
        with library.use(name):
            pass

    for name in [*sources][:FITTING]:
        use(name)

    def one_round(timed: Timed) -> None:
        absent = sources.keys() - {*library.resident, *adapters.patches(other), *theirs.here}
        ours, loaded, theirs_next = random.sample(sorted(absent), 3)  # None reads a file that another has just cached.
        timed("absent", lambda: use(ours))
        there = random.choice(library.resident)
        timed("resident", lambda: use(there))
        timed("load and eject", lambda: by_hand(loaded))
        timed("PEFT", lambda: theirs.exchange(theirs_next, sources[theirs_next]))

    taken = rounds(one_round, seconds=10.0, collect=True)
    found: list[Row] = []
    for what, target in (("absent", TARGETS), ("resident", None)):
        row: Row = {"an adapter that is": what, "ms": 1e3 * median(taken, what), "a second": 1 / median(taken, what)}
        row |= {"target": target} | {f"/ {name}": ratio(taken, what, name) for name in ("load and eject", "PEFT")}
        found.append(row)
    return found


def memory(sources: dict[str, Path], budget: int) -> Row:
    """Peak of bytes in tensors."""
    base, x = model(), torch.randn(1, SIZE)
    library = adapters.Library(base, sources, budget=budget)

    def uses() -> None:
        for name in random.choices([*sources], k=500):
            with library.use(name):
                base(x)

    return {"an adapter that is": "any of them", "target": MOST, "peak / budget": Ratio.exact(peak(uses) / budget)}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        sources, nbytes = written(Path(folder))
        budget = FITTING * nbytes
        report(
            "paging",
            f"{COUNT:,} LoRA of rank {RANK} for {LAYERS} layers of {SIZE} features in files of PEFT, used at random, of"
            f" which {FITTING} fit the budget of {budget / 1e6:.1f} MB; medians and quartiles of rounds. The same by"
            " hand is `load` and `eject`, or `load_adapter` and `delete_adapter` of PEFT, into models with as many"
            " others. The peak is that of all tensors during 500 uses with a call of the model in each.",
            [*times(sources, budget), memory(sources, budget)],
        )
