"""`ByName`, through which the parameters of a layer answer as those of its node."""

from __future__ import annotations

from typing import Any, cast

from torch import nn


class ByName(dict[str, Any]):
    """The parameters or buffers of a node's layer, for access by name as of `torch.func.functional_call`.

    As a dict it is empty: the layer lists its own.
    """

    __slots__ = ("layer", "table")

    def __init__(self, layer: nn.Module, table: str) -> None:
        self.layer, self.table = layer, table

    @property
    def _entries(self) -> dict[str, Any]:
        return cast(dict[str, Any], getattr(self.layer, self.table))

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __setitem__(self, name: str, value: Any) -> None:
        self._entries[name] = value

    def __delitem__(self, name: str) -> None:
        del self._entries[name]

    def __reduce__(self) -> tuple[type[ByName], tuple[nn.Module, str]]:
        return ByName, (self.layer, self.table)
