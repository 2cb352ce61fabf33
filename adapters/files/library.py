"""`Library`, any number of adapters by name, with those in use and the most recently used in the model."""

from __future__ import annotations

import contextlib
import difflib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Self

from adapters.activation.context import activated
from adapters.errors import AdapterError, PatchNameError, PatchStateError
from adapters.files.load import read
from adapters.files.pages import Page, Pages, exchange
from adapters.files.sources import Source
from adapters.patch.patch import Patch, patches
from adapters.patch.use import RowChoice, choices_of, resolved
from adapters.targets.models import Model, as_module


class Library:
    """Adapters by name, thousands if need be, loaded into a model from their files when they are used.

    Adapters stay in the model as long as their tensors fit a budget. To make room, the least recently used leave, and
    never one that is in use. In the model they are active in blocks of `use` only.

    Any number of threads and async tasks may use one library. A thread that needs an adapter which is not in the model
    waits for it, and for others that are being loaded at the same time; calls of the model never wait.

    Attributes:
        budget: The bytes that the tensors in the model may have. While an adapter is being loaded, its own tensors are
            in memory besides.

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
            model: The base model, or several together, as of `load`. It may have other patches.
            sources: The source of each adapter, by name, as of `add`.
            budget: The bytes that the tensors in the model may have.

        Raises:
            AdapterError: The model is not a model, or the budget is not a positive integer.
            PatchNameError: A name is not a string, or empty, or a patch of the model has it.
        """
        if not isinstance(budget, int) or budget <= 0:
            raise AdapterError(f"budget= has to be a positive number of bytes, not {budget!r}.")
        self.budget = budget
        self._model = as_module(model)
        self._read: dict[str, Callable[[], Patch]] = {}
        self._pages = Pages()
        self._closed = False
        self._paging = threading.Lock()  # Held while adapters come or go.
        self._state = threading.Lock()  # Held for moments, to look at the tables and to change them; taken last.
        for name, source in (sources or {}).items():
            self.add(name, source)

    # Contents

    def add(
        self,
        name: str,
        source: Source,
        *,
        component: str | None = None,
        revision: str | None = None,
        strict: bool = True,
    ) -> None:
        """Add an adapter. Nothing is read before it is used.

        Args:
            name: Its name here, and in the model.
            source: A folder, a file, a place on the Hub, or a file that `weights.read_adapter` has read; as of `load`.
            component: As of `load`.
            revision: As of `load`.
            strict: As of `load`.

        Raises:
            PatchNameError: The name is not a string, or empty, or in use here or in the model.
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
        """Remove an adapter, from the model too.

        Raises:
            PatchNameError: The library has no adapter of that name.
            PatchStateError: It is in use.
        """
        with self._paging:
            with self._state:
                if name not in self._read:
                    raise PatchNameError(f"The library has no adapter {name!r}.")
                self._pages.require_idle([name])
                del self._read[name]
                leaving = [self._pages.pop(name)] if name in self._pages else []
            exchange(leaving, ())

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
            return tuple(self._pages.by_use())

    @property
    def nbytes(self) -> int:
        """The bytes of the tensors of the adapters in the model, those that layers share counted once."""
        with self._state:
            return self._pages.nbytes

    def __repr__(self) -> str:
        return f"<Library of {len(self)} adapters, {len(self.resident)} in the model, {self.nbytes:,} bytes>"

    # Use

    @contextlib.contextmanager
    def use(self, *names: str | Mapping[str, float], rows: Sequence[RowChoice] | None = None) -> Iterator[None]:
        """Make just these adapters active, in this block, and in this thread or async task only.

        They are loaded into the model, where they are not there already, and stay at least as long as the block lasts.
        Several are applied in the order in which they were loaded.

        Args:
            names: Names of adapters, or one mapping of names to scales; as of `adapters.use`. Other patches of the
                model may be among them.
            rows: One choice for each row of the batch instead; as of `adapters.use`.

        Raises:
            PatchNameError: A name is neither here nor in the model.
            BudgetError: They do not fit the budget, by themselves or beside the adapters in use.
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

    def _pinned(self, names: Sequence[str]) -> dict[str, Page]:
        """The pages of the names of this library, in the model, and in use from now on."""
        with self._state:
            ours = self._checked(names)
            if all(name in self._pages and self._pages[name].patch.injected for name in ours):
                return self._pages.pin(ours)
        with self._paging:
            return self._paged_in(names)

    def _paged_in(self, names: Sequence[str]) -> dict[str, Page]:
        """The pages of names of which some are not in the model yet. All of them are loaded, or nothing changes."""
        with self._state:
            ours = self._checked(names)  # One may be gone by now.
            for name in [name for name, page in self._pages.items() if not page.patch.injected]:
                del self._pages[name]
            reads = {name: self._read[name] for name in ours if name not in self._pages}
        coming: dict[str, Page] = {}
        for name, read_patch in reads.items():
            patch = read_patch()
            patch.enabled = False  # It is active in blocks of `use` only.
            coming[name] = Page(patch, sum(tensor.nbytes for tensor in patch.state_dict().values()))
            with self._state:
                self._pages.victims(ours, coming, self.budget)  # Nothing more is read if this does not fit.
        with self._state:
            leaving = self._pages.victims(ours, coming, self.budget)
            kept = [self._pages[name] for name in ours if name not in coming]
            for page in kept:
                page.users += 1
            for name in leaving:
                del self._pages[name]  # Nobody gets it any more.
        try:
            exchange(leaving.values(), coming.values())
        except BaseException:
            with self._state:
                self._pages |= leaving
            raise
        else:
            with self._state:
                self._pages |= coming
                return self._pages.pin(ours)
        finally:
            with self._state:
                for page in kept:
                    page.users -= 1

    def _checked(self, names: Iterable[str]) -> list[str]:
        """The names of this library among names; the others have to be of other patches of the model."""
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

    # End

    def close(self) -> None:
        """Take its adapters out of the model, exactly. It cannot be used any more.

        Raises:
            PatchStateError: An adapter is in use.
        """
        with self._paging:
            with self._state:
                self._pages.require_idle(self._pages)
                leaving, self._pages, self._closed = self._pages, Pages(), True
            exchange(leaving.values(), ())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
