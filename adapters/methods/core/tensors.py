"""`Tensors`, the tensors of a branch as a formula takes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from adapters.layers.matrix import Matrix


class Tensors(Mapping[str, Tensor]):
    """Tensors of a branch by name, as attributes and as items, all in one dtype.

    Attributes:
        matrix: The weight as a matrix.

    Example:
        >>> patch = adapters.inject(model, adapters.LoRA(rank=4))
        >>> tensors = patch.attachments[0].branch.values(torch.float64)
        >>> assert tensors.lora_A is tensors["lora_A"] and tensors.lora_A.dtype == torch.float64
    """

    def __init__(self, tensors: Mapping[str, Tensor], matrix: Matrix) -> None:
        self._tensors = tensors
        self.matrix = matrix

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix, `(outputs, inputs)`, with the experts in front for a stack."""
        return self.matrix.shape

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self._tensors[name]
        except KeyError:
            raise AttributeError(f"There is no tensor {name!r}, only {', '.join(self._tensors)}.") from None

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
