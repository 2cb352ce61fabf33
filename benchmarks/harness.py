"""Interleaved timing of several ways to do one thing, and ratios of the results."""

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
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    @classmethod
    def exact(cls, value: float) -> Ratio:
        """Ratio of counts, which have no spread."""
        return cls(value, value, value)

    def __str__(self) -> str:
        return _rounded(self.median) + (
            f" ({_rounded(self.low)}–{_rounded(self.high)})" if self.low < self.high else ""
        )


# A target maps columns to their upper bounds.
Row = dict[str, "str | float | Ratio | Mapping[str, float] | None"]


class Timed(Protocol):
    """Argument of a round: runs a step, records its time under a name, and returns its result."""

    def __call__(self, name: str, run: Callable[[], T]) -> T: ...


def rounds(
    one_round: Callable[[Timed], object],
    seconds: float = 1.0,
    least: int = 5,
    collect: bool = False,
    warm: bool = False,
) -> Times:
    """Seconds of each step in each round.

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
    """Seconds of each way to do one thing, in each round.

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
    """Time of one way relative to another's: the median of the rounds' ratios, with quartiles.

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
    """Median time of a way, in seconds."""
    return statistics.median(times[name])


def repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    """Function that calls another one several times: a timing should take tens of microseconds or more."""

    def run_all() -> None:
        for _ in range(times):
            run()

    return run_all


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def report(name: str, title: str, rows: list[Row]) -> None:
    """Print a table, and replace the last one of that name in `RESULTS.md` and `results.json`.

    A plot of its ratios, if any, is saved beside them and shown in the page.
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
    about = Path("/proc/cpuinfo")  # On other systems Python has the name.
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
    """Number with two decimals, with more if it is small, and with none if it is a count."""
    if isinstance(value, int):
        return str(value)
    return f"{value:.2f}" if abs(value) >= 0.1 or not value else f"{value:.2g}"
