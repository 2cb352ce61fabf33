"""Converting inputs to what the parent works in."""

from __future__ import annotations

from torch import Tensor

from fluxion.errors import ChainValueError
from fluxion.module import ContextModule


class Converter(ContextModule):
    """Its inputs, moved to the device and cast to the dtype of the parent's first parameter."""

    def __init__(self, set_device: bool = True, set_dtype: bool = True) -> None:
        super().__init__()
        self.set_device = set_device
        self.set_dtype = set_dtype

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        parent = self.ensure_parent
        device, dtype = parent.device, parent.dtype
        if device is None or dtype is None:
            raise ChainValueError(f"{parent.get_path()} has no parameter to take a device and a dtype from.")
        return tuple(
            x.to(device=device if self.set_device else None, dtype=dtype if self.set_dtype else None) for x in inputs
        )
