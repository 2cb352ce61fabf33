"""Faults: what is done is cut off or refused, and what is left is all old or all new.

Everything is imported once. Each time the process is forked, and the child does something and is killed, or is refused
by the system what it needs; its parent looks at what it has left, and does the same again.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import click
from huggingface_hub.utils import close_session

import adapters
import weights
from tests.faults.operations import Operation, State

Outcomes = Generator[str, None, None]

DONE, REFUSED, FAULT = 0, 3, 4
NOBODY = 65534
# Of the events of https://docs.python.org/3/library/audit_events.html those before which a kill may matter.
_EVENTS = ("open", "os.", "shutil.", "fcntl.", "socket.connect", "tempfile.")


class Damage(Exception):
    """Something was lost, or is half old and half new, or was not clearly said."""


@dataclass
class Trial:
    """An operation with its template, its two states, and how long it takes.

    Attributes:
        operation: What is tried.
        root: A folder for it.
    """

    operation: Operation
    root: Path

    def __post_init__(self) -> None:
        self._template = self.root / "template"
        self.place = self.root / "place"
        self._template.mkdir()
        self.operation.prepare(self._template)
        (self._template / "out").mkdir(exist_ok=True)
        self.reset()
        self.old = self.operation.state(self.place)
        self.operation.run(self.place)
        self.new = self.operation.state(self.place)
        close_session()
        assert self.old != self.new and threading.active_count() == 1
        self.reset()
        start = time.perf_counter()
        assert self.child(lambda: self.operation.run(self.place)) == DONE
        self.seconds = time.perf_counter() - start

    def reset(self) -> None:
        """Go back to the old state."""
        if self.place.is_mount():
            for path in self.place.iterdir():
                shutil.rmtree(path)
        else:
            shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self._template, self.place, symlinks=True, dirs_exist_ok=True)
        self.operation.reset()

    def start(self, do: Callable[[], object]) -> int:
        """Begin to do something in another process. Returns its number."""
        pid = os.fork()
        if pid:
            return pid
        code = FAULT
        try:
            random.seed()
            do()
            code = DONE
        except (weights.WeightsError, adapters.AdapterError, click.ClickException) as error:
            code = REFUSED if str(error).strip() and "\n" not in str(error) else FAULT
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)

    def end(self, pid: int) -> int:
        """Wait for a process. Returns how it ended, negative where it was killed."""
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    def child(self, do: Callable[[], object], kill_after: float | None = None) -> int:
        """Do something in another process, and kill that after some seconds. Returns how it ended."""
        pid = self.start(do)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(pid, signal.SIGKILL)
        return self.end(pid)

    def look(self) -> str:
        """Which state there is."""
        found = self.operation.state(self.place)
        for name, state in (("old", self.old), ("new", self.new)):
            if found == state:
                return name
        if not self.operation.together and _each_is_whole(found, self.old, self.new):
            return "part"
        raise Damage(f"{sorted(found)} is neither old nor new")

    def again(self) -> None:
        """Do it again after it was cut off: now it succeeds, and nothing else is left."""
        there = self.look() == "new"
        try:
            self.operation.run(self.place)
        except (weights.FileFormatError, click.ClickException):
            if not (there and self.operation.once):
                raise
        close_session()
        if self.look() != "new":
            raise Damage("what is done again does not succeed")
        self.nothing_is_left()

    def nothing_is_left(self, besides: str = "") -> None:
        """See to it that there are no temporary files, but for those of a pattern."""
        out = self.place / "out"
        found = (path for ending in ("tmp", "part", "incomplete") for path in out.rglob(f"*.{ending}"))
        left = [str(path) for path in found if not (besides and path.match(besides))]
        if left:
            raise Damage(f"{', '.join(left)} is left")


def _each_is_whole(found: State, old: State, new: State) -> bool:
    return all(content in (old.get(name), new.get(name)) for name, content in found.items())


@contextmanager
def trial(operation: Operation) -> Iterator[Trial]:
    """An operation in a folder of its own."""
    with folder_in_memory() as root:
        yield Trial(operation, root)


@contextmanager
def folder_in_memory() -> Iterator[Path]:
    """A folder in memory if there is such a place: syncing takes no time there."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as root:
        yield Path(root).resolve()


# When something happens


def at_event(number: int, do: Callable[[], object]) -> list[int]:
    """Do something before an event of the system that has a number, in this process. Returns how many there were."""
    count = [0]
    busy = threading.Lock()

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        source = str(arguments[0]) if arguments else ""
        if not event.startswith(_EVENTS) or source.endswith((".py", ".pyc", ".so")) or not busy.acquire(blocking=False):
            return
        try:
            count[0] += 1
            if count[0] == number:
                do()
        finally:
            busy.release()

    sys.addaudithook(hook)
    return count


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def events_of(one: Trial) -> int:
    """How many events there are."""
    one.reset()
    reader, writer = os.pipe()

    def do() -> None:
        count = at_event(0, _die)
        one.operation.run(one.place)
        os.write(writer, str(count[0]).encode())

    if one.child(do) != DONE:
        raise Damage("it does not succeed")
    os.close(writer)
    with os.fdopen(reader) as file:
        return int(file.read())


# The faults. Each yields what was left, once for each time it is tried.


def killed_at_calls(one: Trial, rounds: int) -> Outcomes:
    """`kill -9` before each call of the system in turn, or before some of them."""
    events = events_of(one)
    numbers = range(1, events + 1)
    for number in random.sample(numbers, min(rounds, events)):
        one.reset()

        def do(number: int = number) -> None:
            at_event(number, _die)
            one.operation.run(one.place)

        one.child(do)
        yield one.look()
        one.again()


def killed_at_random(one: Trial, rounds: int) -> Outcomes:
    """`kill -9` at any moment."""
    for _ in range(rounds):
        one.reset()
        one.child(lambda: one.operation.run(one.place), kill_after=random.uniform(0, 1.1 * one.seconds))
        yield one.look()
        one.again()


def killed_twice(one: Trial, rounds: int) -> Outcomes:
    """`kill -9` at any moment, and again when the same is done again, with the clocks of all files moved."""
    for number in range(rounds):
        one.reset()
        for moment in (0, 2**32) if number % 2 else (2**32, 0):
            one.child(lambda: one.operation.run(one.place), kill_after=random.uniform(0, 1.1 * one.seconds))
            for path in one.place.rglob("*"):
                os.utime(path, (moment, moment), follow_symlinks=False)
        yield one.look()
        one.again()


def refused(one: Trial, do: Callable[[], object]) -> str:
    """What is left by what may be refused. That has to be clearly said."""
    ended = one.child(do)
    found = one.look()
    if ended not in (DONE, REFUSED) or (ended == DONE) != (found == "new"):
        raise Damage(f"it ended with {ended}, and there is what is {found}")
    one.nothing_is_left(one.operation.leaves)
    return found


def full_disk(one: Trial, rounds: int) -> Outcomes:
    """A disk that is full after some bytes: one of that size, or where no disk can be made, a limit of files."""
    with _disk(one.place) as mounted:
        for pages in random.sample(range(rounds), rounds):
            one.reset()
            more = pages * 4096
            if mounted:
                used = shutil.disk_usage(one.place).used
                _mount("remount", f"size={used + more}", one.place)
                found = refused(one, lambda: one.operation.run(one.place))
                _mount("remount", "size=64m", one.place)
            else:
                found = refused(one, lambda more=more: _with_limit(one, more))  # type: ignore[misc]
            yield found
            one.again()


def _with_limit(one: Trial, most: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    one.operation.run(one.place)


def read_only(one: Trial, rounds: int) -> Outcomes:
    """A disk that is read-only, and a folder that belongs to somebody else."""
    with _disk(one.place) as mounted:
        one.reset()
        if mounted:
            _mount("remount", "ro", one.place)
            yield refused(one, lambda: one.operation.run(one.place))
            _mount("remount", "rw", one.place)
            one.again()
    one.reset()
    one.root.chmod(0o755)
    for path in (one.place, *one.place.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)

    def do() -> None:
        if os.getuid() == 0:
            os.setuid(NOBODY)
        one.operation.run(one.place)

    yield refused(one, do)
    for path in (one.place, *one.place.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    one.again()


@contextmanager
def _disk(place: Path) -> Iterator[bool]:
    """A disk of its own at a place, if one can be made."""
    place.mkdir(exist_ok=True)
    mounted = os.getuid() == 0 and _mount("size=64m", "mode=755", place)
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", place], check=True)


def _mount(first: str, second: str, place: Path) -> bool:
    with suppress(OSError):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"{first},{second}", "none", place], capture_output=True)
        return done.returncode == 0
    return False


def cut_short(one: Trial, rounds: int) -> Outcomes:
    """A file of tensors that is read gets shorter meanwhile."""
    sources = [*(one._template / "source").rglob("*.safetensors")]
    if not sources:
        return
    events = events_of(one)
    for _ in range(rounds):
        one.reset()
        chosen = one.place / random.choice(sources).relative_to(one._template)

        def do(chosen: Path = chosen, number: int = random.randint(1, events)) -> None:
            at_event(number, lambda: os.truncate(chosen, random.randrange(chosen.stat().st_size)))
            one.operation.run(one.place)

        ended = one.child(do)
        if ended not in (DONE, REFUSED):
            raise Damage(f"it ended with {ended} where {chosen} was cut short")
        yield one.look()


FAULTS: dict[str, Callable[[Trial, int], Outcomes]] = {
    "`kill -9` at a call": killed_at_calls,
    "`kill -9` at any moment": killed_at_random,
    "`kill -9` twice, clock moved": killed_twice,
    "disk full": full_disk,
    "read-only": read_only,
    "source cut short": cut_short,
}
