"""Processes that write and read one place at once: who reads it sees one whole version, or is told to read it again."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

import weights
from tests.faults.harness import DONE, REFUSED, Damage, Trial
from tests.faults.operations import lora

WRITERS, READERS = 3, 2


def loads_while_saving(root: Path, seconds: float, format: str, kill: bool) -> Counter[str]:
    """Two versions of an adapter are saved in one place all the time, and loaded from there."""
    place = root / ("adapter.safetensors" if format == "lycoris" else "adapter")
    weights.write_adapter(lora(1.0), place, format)

    def save() -> None:
        weights.write_adapter(lora(random.choice((1.0, 2.0))), place, format)

    def load() -> str:
        adapter = weights.read_adapter(place)
        for layer in adapter.layers.values():
            values = {value for tensor in layer.tensors.values() for value in tensor.flatten().tolist()}
            rank = layer.hyperparameters["rank"]
            if len(adapter.layers) != 3 or values != {float(str(rank)) - 2}:
                raise Damage(f"what was loaded has rank {rank} and the numbers {values}")
        return "loaded whole"

    return _at_once(save, load, seconds, kill)


def reads_while_saving(root: Path, seconds: float, kill: bool) -> Counter[str]:
    """Two versions of a file are saved all the time, and its tensors are read one by one."""
    place = root / "file.safetensors"

    def save() -> None:
        value = random.choice((1.0, 2.0))
        weights.save({name: torch.full((3_000,), value) for name in "abcd"}, place)

    save()

    def read() -> str:
        try:
            values = {value for tensor in weights.open(place).values() for value in tensor.tolist()}
        except weights.FileFormatError as error:
            if "has changed since it was opened" not in str(error):
                raise
            return "told to open it again"
        if len(values) != 1:
            raise Damage(f"what was read has the numbers {values}")
        return "loaded whole"

    return _at_once(save, read, seconds, kill)


def all_at_once(one: Trial, rounds: int) -> Counter[str]:
    """Several processes do the same in one place."""
    counts: Counter[str] = Counter()
    for _ in range(rounds):
        one.reset()
        children = [one.start(lambda: one.operation.run(one.place)) for _ in range(WRITERS)]
        for ended in map(one.end, children):
            if ended not in (DONE, REFUSED):
                raise Damage(f"one of {WRITERS} at once ended with {ended}")
            counts["did it" if ended == DONE else "were told that another does"] += 1
        if one.look() != "new":
            raise Damage(f"{WRITERS} at once left what is {one.look()}")
        one.again()
    return counts


def _at_once(write: Callable[[], object], read: Callable[[], str], seconds: float, kill: bool) -> Counter[str]:
    """What readers say, while others write, and are killed at any moment and started again if that is wanted."""
    start, writers = time.monotonic(), [_forked(write) for _ in range(WRITERS)]
    pipes = []
    for _ in range(READERS):
        reader, writer = os.pipe()
        _forked(read, until=start + seconds, to=writer)
        os.close(writer)
        pipes.append(os.fdopen(reader))
    while time.monotonic() < start + seconds:
        time.sleep(random.uniform(0, 0.02) if kill else seconds)
        if kill:
            _stop(writers.pop(0))
            writers.append(_forked(write))
    for pid in writers:
        _stop(pid)
    counts: Counter[str] = Counter()
    for pipe in pipes:
        with pipe:
            lines = pipe.read().splitlines()
        if lines[-1] != "end":
            raise Damage(lines[-1])
        counts.update(lines[:-1])
    for _ in pipes:
        os.wait()
    counts["loaded whole"] += read() == "loaded whole"
    return counts


def _forked(do: Callable[[], object], until: float = float("inf"), to: int | None = None) -> int:
    """Do something again and again in another process, which tells what comes of it. Returns its number."""
    pid = os.fork()
    if pid:
        return pid
    random.seed()
    said = []
    try:
        while time.monotonic() < until:
            said.append(do())
        said.append("end")
    except BaseException as error:
        said.append(f"{type(error).__name__}: {error}")
    if to is not None:
        with suppress(OSError), os.fdopen(to, "w") as file:
            file.write("\n".join(map(str, said)))
    os._exit(0)


def _stop(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
