"""Pages: adapters of a library that are in the model, and those that have to leave for others to come."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from adapters.errors import BudgetError, PatchStateError
from adapters.patch.patch import Patch
from adapters.patch.surgery import evict
from adapters.patch.transaction import without_collections


@dataclass(eq=False)
class Page:
    """An adapter in the model.

    Attributes:
        patch: The adapter.
        nbytes: The bytes of its tensors.
        used: The time of its last use, as a number that grows.
        users: The number of blocks that use it at the moment.
    """

    patch: Patch
    nbytes: int
    used: int = 0
    users: int = 0


class Pages(dict[str, Page]):
    """The adapters in the model by name."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = itertools.count(1)

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors."""
        return sum(page.nbytes for page in self.values())

    def by_use(self) -> list[str]:
        """The names, the least recently used first."""
        return sorted(self, key=lambda name: self[name].used)

    def pin(self, names: Sequence[str]) -> dict[str, Page]:
        """The pages of some names, with one user more each."""
        pages = {name: self[name] for name in names}
        for page in pages.values():
            page.users += 1
            page.used = next(self._clock)
        return pages

    def require_idle(self, names: Collection[str]) -> None:
        """Raise a PatchStateError for an adapter that is in use."""
        for name in names:
            if name in self and self[name].users:
                raise PatchStateError(f"The adapter {name!r} is in use: leave the blocks that use it first.")

    def victims(self, names: Collection[str], coming: Mapping[str, Page], budget: int) -> dict[str, Page]:
        """The pages that have to leave for others to come, the least recently used first.

        Args:
            names: The adapters that are wanted, which stay.
            coming: The pages that come.
            budget: The bytes that all together may have.

        Raises:
            BudgetError: What is wanted does not fit, by itself or beside the adapters in use.
        """
        needed = sum(page.nbytes for page in coming.values())
        held = {name: page for name, page in self.items() if page.users or name in names}
        wanted = {**coming, **{name: page for name, page in held.items() if name in names}}
        together = sum(page.nbytes for page in wanted.values())
        if together > budget:
            raise BudgetError(
                f"A budget of {budget:,} bytes is too small for the {together:,} of"
                f" {', '.join(map(repr, wanted))}: raise budget, or use fewer at once."
            )
        left = budget - sum(page.nbytes for page in held.values())
        if needed > left:
            raise BudgetError(
                f"Adapters in use leave {left:,} bytes of a budget of {budget:,}, too few for the {needed:,} of"
                f" {', '.join(map(repr, coming))}: raise budget, or use fewer at once."
            )
        free = budget - self.nbytes - needed
        victims: dict[str, Page] = {}
        for name in self.by_use():
            if free >= 0:
                break
            if name not in held:
                victims[name] = self[name]
                free += victims[name].nbytes
        return victims


def exchange(leaving: Collection[Page], coming: Collection[Page]) -> None:
    """Take some adapters out of their model for good, and inject others; all of it or nothing."""
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
        evict(page.patch)
