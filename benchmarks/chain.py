"""Cost of a chain: calling it, building it, changing it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import fluxion as fl
from benchmarks.harness import Row, in_turns, median, ratio, repeated, report

try:
    import refiners.fluxion.layers as ancestor  # type: ignore[import-not-found]
except ImportError:
    ancestor = None

X = torch.ones(1)
Make = Callable[..., Any]


def kinds() -> dict[str, tuple[Make, Make]]:
    """Container and identity of each library."""
    found: dict[str, tuple[Make, Make]] = {
        "fluxion": (fl.Chain, fl.Identity),
        "nn.Sequential": (nn.Sequential, nn.Identity),
    }
    if ancestor is not None:
        found["refiners"] = (ancestor.Chain, ancestor.Identity)
    return found


def compare(
    case: str, target: Mapping[str, float], count: int, ways: Mapping[str, Callable[[], object]], seconds: float = 1.0
) -> Row:
    """Row of the table: time of fluxion for one of `count` steps, and its ratios to the others."""
    times = in_turns(ways, seconds)
    row: Row = {"case": case, "target": target, "µs each": 1e6 * median(times, "fluxion") / count}
    return row | {f"/ {name}": ratio(times, "fluxion", name) for name in ways if name != "fluxion"}


def flat(count: int) -> Row:
    runs = max(1, 1000 // count)
    models = {name: chain(*(leaf() for _ in range(count))) for name, (chain, leaf) in kinds().items()}
    ways = {name: repeated(partial(model, X), runs) for name, model in models.items()}
    return compare(f"call {count} identities", {"/ nn.Sequential": 1.05}, count * runs, ways)


def nest(chain: Make, leaf: Make, depth: int) -> Any:
    model = leaf()
    for _ in range(depth):
        model = chain(model)
    return model


def nested(depth: int, target: Mapping[str, float]) -> Row:
    models = {name: nest(chain, leaf, depth) for name, (chain, leaf) in kinds().items()}
    ways = {name: repeated(partial(model, X), 8) for name, model in models.items()}
    ways["8 levels"] = repeated(partial(nest(fl.Chain, fl.Identity, 8), X), depth)  # As many levels in total.
    return compare(f"call {depth} levels", target, 8 * depth, ways)


def appends(count: int, target: Mapping[str, float], names: Iterable[str]) -> Row:
    def build(chain: Make, leaves: list[nn.Module]) -> None:
        model = chain()
        for leaf in leaves:
            model.append(leaf)

    made = {name: (chain, [leaf() for _ in range(count)]) for name, (chain, leaf) in kinds().items() if name in names}
    ways = {name: partial(build, *given) for name, given in made.items()}
    return compare(f"append {count:,} times", target, count, ways)


def replacing(count: int) -> Callable[[], None]:
    """Replace a child in the middle, back and forth."""
    leaf, other = fl.Identity(), fl.ReLU()
    chain = fl.Chain([*(fl.Identity() for _ in range(count // 2)), leaf, *(fl.Identity() for _ in range(count // 2))])

    def swap() -> None:
        chain.replace(leaf, other)
        chain.replace(other, leaf)

    return repeated(swap, 100)


def replaces(count: int, target: Mapping[str, float]) -> Row:
    ways = {"fluxion": replacing(count), "100 children": replacing(100)}
    return compare(f"replace one of {count:,}", target, 200, ways)


def main() -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        rows = [flat(count) for count in (10, 100, 1000)]
        rows += [nested(32, {"/ nn.Sequential": 1.3})]
        rows += [nested(depth, {"/ 8 levels": 1.1}) for depth in (16, 64, 128, 256, 500)]
        rows += [appends(1_000, {"/ nn.Sequential": 3}, kinds())]
        rows += [appends(10_000, {"/ nn.Sequential": 3}, ["fluxion", "nn.Sequential"])]
        rows += [replaces(10_000, {"/ 100 children": 1.1})]
    report(
        "chain",
        "Time of `fluxion` for each layer, level or change, and its ratio to peers; medians and quartiles of rounds.",
        rows,
    )
