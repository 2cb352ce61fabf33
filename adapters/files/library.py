"""`Library`, any number of adapters by name, of which those in use and the last used are in the model."""

from __future__ import annotations

import contextlib
import difflib
import itertools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Self

import weights
from adapters.activation.context import activated
from adapters.errors import AdapterError, BudgetError, PatchNameError, PatchStateError
from adapters.files.load import read
from adapters.patch.patch import Patch, patches
from adapters.patch.transaction import without_collections
from adapters.patch.use import RowChoice, choices_of, resolved
from adapters.targets.models import Model, as_module

Source = str | PathLike[str] | weights.AdapterFile


@dataclass(eq=False)
class _Page:
    """An adapter in the model.

    Attributes:
        patch: The adapter.
        nbytes: How many bytes its tensors have.
        used: When it was used last: what was used later has a higher number.
        users: How many blocks use it at the moment.
    """

    patch: Patch
    nbytes: int
    used: int = 0
    users: int = 0


class Library:
    """Adapters by name, thousands if need be, which come into a model from their files when they are used.

    What was used last stays in the model, as long as its tensors fit a budget. To make room, those leave that were not
    used for the longest time, and never one that is in use. In the model they act in blocks of `use` only.

    Any number of threads and async tasks may use one library. Only who needs an adapter that is not there waits, for
    that one, and for others that come at the same time; calls of the model never wait.

    Attributes:
        budget: How many bytes the tensors in the model may have. While an adapter comes in, its own are in memory
            besides.

    Example:
        >>> with adapters.Library(model, {"style": "style.safetensors"}, budget=2_000_000_000) as library:
        ...     library.add("pose", "someone/pose-lora")
        ...     with library.use("style"):
        ...         model(x)
        ...     with library.use(rows=["style", None, {"pose": 0.7}]):
        ...         model(batch)
    """

    def __init__(self, model: Model, sources: Mapping[str, Source] | None = None, *, budget: int) -> None:
        """
        Args:
            model: The base model, or several together, as `load` takes them. It may have other patches.
            sources: Where each adapter is, by name: as `add` takes them.
            budget: How many bytes the tensors in the model may have.

        Raises:
            AdapterError: The model is none, or the budget no positive integer.
            PatchNameError: A name is no string, or empty, or a patch of the model has it.
        """
        if not isinstance(budget, int) or budget <= 0:
            raise AdapterError(f"budget= has to be a number of bytes above zero, not {budget!r}.")
        self.budget = budget
        self._model = as_module(model)
        self._read: dict[str, Callable[[], Patch]] = {}
        self._pages: dict[str, _Page] = {}
        self._clock = itertools.count(1)
        self._closed = False
        self._paging = threading.Lock()  # Held while adapters come or go.
        self._state = threading.Lock()  # Held for moments, to look at the tables and to change them; taken last.
        for name, source in (sources or {}).items():
            self.add(name, source)

    # What it knows

    def add(
        self,
        name: str,
        source: Source,
        *,
        component: str | None = None,
        revision: str | None = None,
        strict: bool = True,
    ) -> None:
        """Make an adapter known. Nothing is read before it is used.

        Args:
            name: What it is called here, and in the model.
            source: A folder, a file, a place on the Hub, or what `weights.read_adapter` has read; as of `load`.
            component: As of `load`.
            revision: As of `load`.
            strict: As of `load`.

        Raises:
            PatchNameError: The name is no string, or empty, or in use here or in the model.
        """
        if not (isinstance(name, str) and name):
            raise PatchNameError(f"An adapter needs a name that is a string and not empty, not {name!r}.")
        with self._state:
            if name in self._read:
                raise PatchNameError(f"The library has an adapter {name!r} already: remove it, or choose another name.")
            if name in patches(self._model):
                raise PatchNameError(f"The model has a patch {name!r} already: choose another name.")
            self._read[name] = partial(
                read, self._model, source, name, component=component, revision=revision, strict=strict
            )

    def remove(self, name: str) -> None:
        """Forget an adapter, and take it out of the model.

        Raises:
            PatchNameError: There is none of that name.
            PatchStateError: It is in use.
        """
        with self._paging:
            with self._state:
                if name not in self._read:
                    raise PatchNameError(f"The library has no adapter {name!r}.")
                self._require_idle([name])
                del self._read[name]
                leaving = [self._pages.pop(name)] if name in self._pages else []
            _exchange(leaving, ())

    def __contains__(self, name: object) -> bool:
        return name in self._read

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._read))

    def __len__(self) -> int:
        return len(self._read)

    @property
    def resident(self) -> tuple[str, ...]:
        """The names of the adapters in the model, the least recently used first."""
        with self._state:
            return tuple(self._by_use())

    @property
    def nbytes(self) -> int:
        """How many bytes the tensors of the adapters in the model have, those that layers share counted once."""
        with self._state:
            return self._total()

    def __repr__(self) -> str:
        return f"<Library of {len(self)} adapters, {len(self.resident)} in the model, {self.nbytes:,} bytes>"

    # Using them

    @contextlib.contextmanager
    def use(self, *names: str | Mapping[str, float], rows: Sequence[RowChoice] | None = None) -> Iterator[None]:
        """In this block, and in this thread or async task only, let just these adapters act.

        They are brought into the model, where they are not there already, and stay at least as long as the block lasts.
        Several that act together do so in the order in which they came.

        Args:
            names: Names of adapters, or one mapping of names to scales; as of `adapters.use`. Other patches of the
                model may be among them.
            rows: One choice for each row of the batch instead; as of `adapters.use`.

        Raises:
            PatchNameError: A name is neither here nor in the model.
            BudgetError: They do not fit the budget, by themselves or beside those that are in use.
            LayerMismatchError: A file does not fit the model.
            weights.WeightsError: A source cannot be read.
            AdapterError: As of `adapters.use`.
            PatchStateError: The library is closed.
        """
        choices = choices_of(names, rows)
        wanted = list(dict.fromkeys(name for choice in choices for name in choice))
        pages = self._pinned(wanted)
        try:
            with self._state:
                ours = [page.patch for page in self._pages.values()]
            known = {name: patch for name, patch in patches(self._model).items() if name not in self._read}
            known |= {name: page.patch for name, page in pages.items()}
            with activated({**dict.fromkeys(ours, 0.0), **resolved(choices, known, rows is not None)}):
                yield
        finally:
            with self._state:
                for page in pages.values():
                    page.users -= 1

    def _pinned(self, names: Sequence[str]) -> dict[str, _Page]:
        """The pages of the names that are of this library, in the model, and in use from now on."""
        with self._state:
            ours = self._checked(names)
            if all(name in self._pages and self._pages[name].patch.injected for name in ours):
                return self._in_use(ours)
        with self._paging:
            return self._paged_in(names)

    def _in_use(self, names: Sequence[str]) -> dict[str, _Page]:
        pages = {name: self._pages[name] for name in names}
        for page in pages.values():
            page.users += 1
            page.used = next(self._clock)
        return pages

    def _paged_in(self, names: Sequence[str]) -> dict[str, _Page]:
        """The same, where some are not in the model yet. All of them come, or nothing changes."""
        with self._state:
            ours = self._checked(names)  # One may be gone by now.
            self._pages = {name: page for name, page in self._pages.items() if page.patch.injected}
            reads = {name: self._read[name] for name in ours if name not in self._pages}
        coming: dict[str, _Page] = {}
        for name, read_patch in reads.items():
            patch = read_patch()
            patch.enabled = False  # It acts in blocks of `use` only.
            coming[name] = _Page(patch, sum(tensor.nbytes for tensor in patch.state_dict().values()))
            with self._state:
                self._victims(ours, coming)  # What cannot fit is not read to its end.
        with self._state:
            leaving = self._victims(ours, coming)
            kept = [self._pages[name] for name in ours if name not in coming]
            for page in kept:
                page.users += 1
            for name in leaving:
                del self._pages[name]  # Nobody gets it any more.
        try:
            _exchange(leaving.values(), coming.values())
        except BaseException:
            with self._state:
                self._pages |= leaving
            raise
        else:
            with self._state:
                self._pages |= coming
                return self._in_use(ours)
        finally:
            with self._state:
                for page in kept:
                    page.users -= 1

    def _victims(self, names: Collection[str], coming: Mapping[str, _Page]) -> dict[str, _Page]:
        """What has to leave the model for some pages to come, besides which those of `names` stay."""
        needed = sum(page.nbytes for page in coming.values())
        held = {name: page for name, page in self._pages.items() if page.users or name in names}
        wanted = {**coming, **{name: page for name, page in held.items() if name in names}}
        together = sum(page.nbytes for page in wanted.values())
        if together > self.budget:
            raise BudgetError(
                f"A budget of {self.budget:,} bytes is too small for the {together:,} of"
                f" {', '.join(map(repr, wanted))}: raise budget, or use fewer at once."
            )
        left = self.budget - sum(page.nbytes for page in held.values())
        if needed > left:
            raise BudgetError(
                f"Adapters in use leave {left:,} bytes of a budget of {self.budget:,}, too few for the {needed:,} of"
                f" {', '.join(map(repr, coming))}: raise budget, or use fewer at once."
            )
        free = self.budget - self._total() - needed
        victims: dict[str, _Page] = {}
        for name in self._by_use():
            if free >= 0:
                break
            if name not in held:
                victims[name] = self._pages[name]
                free += victims[name].nbytes
        return victims

    def _checked(self, names: Iterable[str]) -> list[str]:
        """Those of the names that are of this library, where the others are of other patches of the model."""
        if self._closed:
            raise PatchStateError("The library is closed: make a new one.")
        names = list(names)
        others = [name for name in names if name not in self._read]
        known = patches(self._model) if others else {}
        for name in others:
            if name not in known:
                near = difflib.get_close_matches(str(name), [*self._read, *known], n=1)
                hint = f"did you mean {near[0]!r}?" if near else "add it first."
                raise PatchNameError(f"Neither the library nor the model has an adapter {name!r}: {hint}")
        return [name for name in names if name in self._read]

    def _require_idle(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._pages and self._pages[name].users:
                raise PatchStateError(f"The adapter {name!r} is in use: leave the blocks that use it first.")

    def _by_use(self) -> list[str]:
        return sorted(self._pages, key=lambda name: self._pages[name].used)

    def _total(self) -> int:
        return sum(page.nbytes for page in self._pages.values())

    # Leaving

    def close(self) -> None:
        """Take everything that it brought out of the model, exactly. It cannot be used any more.

        Raises:
            PatchStateError: An adapter is in use.
        """
        with self._paging:
            with self._state:
                self._require_idle(self._pages)
                leaving, self._pages, self._closed = self._pages, {}, True
            _exchange(leaving.values(), ())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _exchange(leaving: Collection[_Page], coming: Collection[_Page]) -> None:
    """Take some adapters out of their model for good, and put others in, or do nothing where one cannot be put in."""
    with without_collections(), contextlib.ExitStack() as undo:
        for page in leaving:
            if page.patch.injected:  # Its user may have ejected it by hand.
                page.patch.eject()
                undo.callback(page.patch.inject)
        for page in coming:
            page.patch.inject()
            undo.callback(page.patch.eject)
        undo.pop_all()
    for page in leaving:
        page.patch._give_up()
