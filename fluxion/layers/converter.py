"""Conversion of inputs to the device and dtype of the parent."""

from __future__ import annotations

from torch import Tensor

from fluxion.errors import ChainValueError
from fluxion.links import ContextModule


class Converter(ContextModule):
    """Conversion of its inputs to the device and dtype of the parent's first parameter.

    Raises:
        ChainValueError: The parent has no parameter, or there is no parent.

    Example:
        >>> fl.Chain(fl.Converter(), fl.Linear(2, 2, dtype=torch.float64))(torch.ones(1, 2)).dtype
        torch.float64
    """

    def __init__(self, set_device: bool = True, set_dtype: bool = True) -> None:
        """
        Args:
            set_device: Move the inputs to the device.
            set_dtype: Cast the inputs to the dtype.
        """
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
