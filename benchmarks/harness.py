"""Timing several ways to do one thing, and keeping what came out."""

from __future__ import annotations

import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

HERE = Path(__file__).parent
Row = dict[str, str | float | None]


def medians(ways: Mapping[str, Callable[[], object]], seconds: float = 1.0, min_rounds: int = 5) -> dict[str, float]:
    """The median time of each way, in seconds. They take turns, so that what slows one down slows all of them.

    A way that fails, as deep trees do at the recursion limit, has no time.
    """
    times: dict[str, list[float]] = {}
    for name, run in ways.items():
        try:
            run()
        except RuntimeError:
            continue
        times[name] = []
    start = time.perf_counter()
    gc.disable()
    try:
        while time.perf_counter() - start < seconds or min(map(len, times.values())) < min_rounds:
            for name, taken in times.items():
                before = time.perf_counter()
                ways[name]()
                taken.append(time.perf_counter() - before)
    finally:
        gc.enable()
    return {name: statistics.median(taken) for name, taken in times.items()}


def repeated(run: Callable[[], object], times: int) -> Callable[[], None]:
    """A function that runs another one some times: what is timed should take tens of microseconds or more."""

    def run_all() -> None:
        for _ in range(times):
            run()

    return run_all


def report(name: str, title: str, rows: list[Row]) -> None:
    """Print a table, and put it in `RESULTS.md` and `results.json` in place of the last one of that name."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    lines += [" | ".join(_cell(row.get(column)) for column in columns) for row in rows]
    table = "\n".join(f"| {line} |" for line in lines)
    machine = f"{_processor()}, Python {platform.python_version()}, torch {torch.__version__}"
    section = f"## {name}\n\n{title}\n\n{machine}, {torch.get_num_threads()} thread.\n\n{table}\n"
    print(section)

    page = HERE / "RESULTS.md"
    text = page.read_text(encoding="utf-8") if page.exists() else "# Results\n"
    before, _, rest = text.partition(f"\n## {name}\n")
    _, found, after = rest.partition("\n## ")
    page.write_text(f"{before}\n{section}{found}{after}", encoding="utf-8")

    data = HERE / "results.json"
    everything = json.loads(data.read_text(encoding="utf-8")) if data.exists() else {}
    everything[name] = {"machine": machine, "rows": rows}
    data.write_text(json.dumps(everything, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _processor() -> str:
    about = Path("/proc/cpuinfo")  # Elsewhere Python knows the name.
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _cell(value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    return "–" if value is None else f"{value:.2f}"
