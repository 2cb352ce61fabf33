"""Timing several ways to do one thing in turns, and keeping what came out as ratios."""

from __future__ import annotations

import dataclasses
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from benchmarks.plot import plot

HERE = Path(__file__).parent
HEAD = """# Results

Made by `make bench`, or one at a time by `python -m benchmarks NAME`. Everything in a table is timed in one process, in
turns. A ratio is the median of those of the single rounds, with their quartiles.
"""
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
T = TypeVar("T")
Times = dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A median and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def exact(cls, value: float) -> Ratio:
        """For what is counted, and has no spread."""
        return cls(value, value, value)

    def __str__(self) -> str:
        return _rounded(self.median) + (
            f" ({_rounded(self.low)}–{_rounded(self.high)})" if self.low < self.high else ""
        )


# A target is a mapping of columns to what they should be at most.
Row = dict[str, "str | float | Ratio | Mapping[str, float] | None"]


class Timed(Protocol):
    """What a round is given: it runs a step, keeps the time under a name, and returns the result of the step."""

    def __call__(self, name: str, run: Callable[[], T]) -> T: ...


def rounds(
    one_round: Callable[[Timed], object],
    seconds: float = 1.0,
    least: int = 5,
    collect: bool = False,
    warm: bool = False,
) -> Times:
    """The seconds that each step has taken in each round.

    Args:
        one_round: Runs all steps, those to be compared in turns: what slows one down slows all of them.
        seconds: How long to go on.
        least: How many rounds there are, however long they take.
        collect: Let Python look for cycles as it does for users, for steps that make many objects. Before each round
            there are none.
        warm: Whether what is timed has been run before. Otherwise a first round is not counted.
    """
    times: Times = {}

    def timed(name: str, run: Callable[[], T]) -> T:
        synchronize()
        before = time.perf_counter()
        result = run()
        synchronize()
        times.setdefault(name, []).append(time.perf_counter() - before)
        return result

    if not warm:
        one_round(timed)
        times.clear()
    start, done = time.perf_counter(), 0
    enabled = gc.isenabled()
    try:
        while done < least or time.perf_counter() - start < seconds:
            gc.enable()
            if collect:
                gc.collect()
            else:
                gc.disable()
            one_round(timed)
            done += 1
    finally:
        (gc.enable if enabled else gc.disable)()
    return times


def in_turns(ways: Mapping[str, Callable[[], object]], seconds: float = 1.0, least: int = 5) -> Times:
    """The seconds that each way to do one thing has taken in each round.

    A way that fails, as deep trees do at the recursion limit, has no times.
    """
    able: dict[str, Callable[[], object]] = {}
    for name, run in ways.items():
        try:
            run()
        except RuntimeError:
            continue
        able[name] = run

    def one_round(timed: Timed) -> None:
        for name, run in able.items():
            timed(name, run)

    return rounds(one_round, seconds, least, warm=True)


def ratio(times: Times, name: str, other: str, factor: float = 1.0) -> Ratio | None:
    """The time of one way as a multiple of another's: the median of the rounds' ratios, with quartiles.

    Args:
        times: As of `rounds`.
        name: The way.
        other: What it is compared to.
        factor: How many times as much the other has done.
    """
    if name not in times or other not in times:
        return None
    return Ratio.of([factor * one / two for one, two in zip(times[name], times[other], strict=True)])


def median(times: Times, name: str) -> float:
    """The median time of a way, in seconds."""
    return statistics.median(times[name])


def repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    """A function that runs another one some times: what is timed should take tens of microseconds or more."""

    def run_all() -> None:
        for _ in range(times):
            run()

    return run_all


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def report(name: str, title: str, rows: list[Row]) -> None:
    """Print a table, and put it in `RESULTS.md` and `results.json` in place of the last one of that name.

    Where there are ratios, a plot of them is beside these, and in the page.
    """
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cell(row.get(column)) for column in columns) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    threads = torch.get_num_threads()
    machine = f"{_processor()}, Python {platform.python_version()}, torch {torch.__version__}"
    machine += f", {threads} thread{'s' * (threads > 1)}"
    section = f"## {name}\n\n{title}\n\n{machine}.\n\n{table}\n"
    if plot(rows, HERE / f"{name}.svg"):
        section += f"\n![The ratios, with their targets.]({name}.svg)\n"
    print(section)

    page = HERE / "RESULTS.md"
    text = page.read_text(encoding="utf-8") if page.exists() else HEAD
    before, _, rest = text.partition(f"\n## {name}\n")
    _, found, after = rest.partition("\n## ")
    page.write_text(f"{before}\n{section}{found}{after}", encoding="utf-8")

    data = HERE / "results.json"
    everything = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
    everything[name] = {"machine": machine, "rows": rows}
    text = json.dumps(everything, indent=2, ensure_ascii=False, default=dataclasses.asdict)
    data.write_text(text + "\n", encoding="utf-8")


def _processor() -> str:
    about = Path("/proc/cpuinfo")  # Elsewhere Python knows the name.
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = next(iter(names), platform.processor() or platform.machine())
    return f"{name}, {torch.cuda.get_device_name()}" if DEVICE.type == "cuda" else name


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, Mapping):
        return ", ".join(f"{column} ≤ {limit:g}" for column, limit in value.items())
    return _rounded(value) if isinstance(value, int | float) else str(value)


def _rounded(value: float) -> str:
    """Two decimals, or more where these say little, and none for what is counted."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.2g}"
