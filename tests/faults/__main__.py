"""Try every fault on every operation, and count what is left.

`python -m tests.faults --rounds 100 --write SECURITY.md` renews the table there. It ends with 1 if anything was lost.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch

import weights
from tests.faults.harness import FAULTS, Damage, Trial, folder_in_memory, trial
from tests.faults.hub import Hub
from tests.faults.operations import Operation, lora, operations
from tests.faults.together import READERS, WRITERS, all_at_once, loads_while_saving, reads_while_saving
from weights.tensors import rewrite as streaming

BEGIN, END = "<!-- python -m tests.faults -->", "<!-- end -->"
Row = tuple[str, Sequence[str]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100, help="how often each fault is tried on each operation")
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="for how long at most; of what kills none, a quarter"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="what the names of the operations have in them")
    parser.add_argument("--write", type=Path, help="a file with a table to renew")
    args = parser.parse_args()
    random.seed(args.seed)
    torch.set_num_threads(1)
    # As small as what is merged here, so that it is in many parts.
    streaming._UNSYNCED, streaming._AT_ONCE, streaming._WAITING = 8_000, 4_096, 0
    run = Run(args.rounds, args.seconds)
    with served() as hub:
        text = run.table([operation for operation in operations(hub) if args.only in operation.name])
    print(text)
    if args.write is not None:
        content = args.write.read_text()
        args.write.write_text(re.sub(f"(?<={BEGIN}\n).*(?={END})", lambda _: text, content, flags=re.DOTALL))
    for damage in run.damages:
        print(damage, file=sys.stderr)
    return 1 if run.damages else 0


@contextmanager
def served() -> Iterator[Hub]:
    """A Hub that has an adapter."""
    with tempfile.TemporaryDirectory() as folder:
        weights.write_adapter(lora(2.0), folder)
        files = {path.name: path.read_bytes() for path in Path(folder).iterdir()}
    with Hub(files) as hub:
        yield hub


class Run:
    """One run of all faults.

    Attributes:
        damages: What was lost.
        kills: How often something was killed.
    """

    def __init__(self, rounds: int, seconds: float) -> None:
        self.damages: list[str] = []
        self.kills = 0
        self._rounds, self._seconds = rounds, seconds

    def table(self, tried: Sequence[Operation]) -> str:
        """The tables, in Markdown."""
        rows: list[Row] = []
        shared: list[Row] = []
        for operation in tried:
            with trial(operation) as one:
                rows.append((operation.name, [self._tried(one, fault) for fault in FAULTS]))
                counts = self._guarded(operation.name, lambda one=one: all_at_once(one, max(1, self._rounds // 10)))  # type: ignore[misc]
                shared.append((f"{WRITERS} processes: {operation.name}", [_said(counts)]))
        for name, case in self._cases().items():
            with folder_in_memory() as root:
                counts = self._guarded(name, partial(case, root))
            shared.append((name, [_said(counts)]))
        lost = len(self.damages)
        return (
            f"{_drawn(['', *FAULTS], rows)}\n{_drawn(['At once', 'What came of it'], shared)}\n"
            f"`kill -9` {self.kills:,} times in all; anything lost, half done or not clearly said: {lost} times.\n"
        )

    def _tried(self, one: Trial, fault: str) -> str:
        counts: Counter[str] = Counter()
        until = time.monotonic() + self._seconds * (1.0 if "kill" in fault else 0.25)

        def try_() -> Counter[str]:
            with closing(FAULTS[fault](one, self._rounds)) as outcomes:
                for outcome in outcomes:
                    counts[outcome] += 1
                    if time.monotonic() > until:
                        break
            return counts

        self._guarded(f"{one.operation.name}, {fault}", try_)
        if "kill" in fault:
            self.kills += counts.total() * (2 if "twice" in fault else 1)
        return _said(counts)

    def _guarded(self, name: str, do: Callable[[], Counter[str]]) -> Counter[str]:
        try:
            return do()
        except (Damage, weights.WeightsError) as error:
            self.damages.append(f"{name}: {error}")
            return Counter({"LOST": 1})

    def _cases(self) -> dict[str, Callable[[Path], Counter[str]]]:
        seconds = min(5.0, self._seconds)
        who = f"{WRITERS} processes save, {READERS} load"
        return {
            f"{who}: a file": partial(reads_while_saving, seconds=seconds, kill=False),
            f"{who}: a file; savers killed": partial(reads_while_saving, seconds=seconds, kill=True),
            f"{who}: PEFT": partial(loads_while_saving, seconds=seconds, format="peft", kill=False),
            f"{who}: PEFT; savers killed": partial(loads_while_saving, seconds=seconds, format="peft", kill=True),
            f"{who}: fluxion; savers killed": partial(loads_while_saving, seconds=seconds, format="fluxion", kill=True),
        }


def _said(counts: Counter[str]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(counts.items())) or "–"


def _drawn(header: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [header, ["---"] * len(header), *([name, *cells] for name, cells in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
