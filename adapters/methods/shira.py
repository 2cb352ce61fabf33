"""SHiRA: a few entries of the weight are trained, at fixed positions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import TargetError
from adapters.methods.core.checks import is_integer, need, need_rank, need_seed
from adapters.methods.core.formulas import Additive
from adapters.methods.core.spec import WeightSpec
from adapters.methods.core.tensors import Tensors


@dataclass(frozen=True)
class SHiRA(Additive):
    """Sparse high-rank adaptation.

    Args:
        rank: The number of trained entries is that of LoRA at this rank, `rank · (outputs + inputs)`. The rank of the
            update is not limited by it.
        seed: The random seed of the positions, which are then equal in all layers of one shape. None draws others for
            each layer, with the seed of `inject`.

    Raises:
        AdapterError: A number is out of its range.

    Example:
        >>> patch = adapters.inject(model, adapters.SHiRA(rank=2, seed=0))
        >>> patch.merge()
        >>> patch.save_pretrained("shira")
    """

    key = "shira"
    paper = "arXiv:2406.13175"
    formula = "W + S, with S zero but for some trained entries"
    kinds = frozenset({"linear", "convolution", "embedding", "stack"})

    rank: int = 32
    seed: int | None = None

    def __post_init__(self) -> None:
        need_rank(self)
        need(self.seed is None or is_integer(self.seed), self, "a seed that is an integer or None", self.seed)
        if self.seed is not None:
            need_seed(self)

    def check_spec(self, spec: WeightSpec) -> None:
        outputs, inputs = spec.shape[-2:]
        if self._count(spec) > outputs * inputs:
            raise TargetError(
                f"{spec.path} has {outputs * inputs} entries, {outputs} × {inputs}, and rank={self.rank} asks for"
                f" {self._count(spec)}: give it a smaller rank."
            )

    def check_tensors(self, spec: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
        for places, size in zip(tensors["shira_indices"].long(), spec.shape[-2:], strict=True):
            if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < size:
                raise TargetError(f"shira_indices has positions outside of {tuple(spec.shape[-2:])}")

    def tensors(self, spec: WeightSpec) -> dict[str, Tensor]:
        return {"shira_weight": spec.zeros(*spec.shape[:-2], self._count(spec))}

    def constants(self, spec: WeightSpec) -> dict[str, Tensor]:
        inputs, places = spec.shape[-1], spec.shuffled(self.seed)[: self._count(spec)].sort().values
        return {"shira_indices": torch.stack([places // inputs, places % inputs]).to(spec.device, torch.int32)}

    def _count(self, spec: WeightSpec) -> int:
        return self.rank * sum(spec.shape[-2:])

    def delta(self, t: Tensors) -> Tensor:
        rows, columns = t.shira_indices.long()
        flat = t.shira_weight.new_zeros(*t.shape[:-2], t.shape[-2] * t.shape[-1])
        return flat.index_add(-1, rows * t.shape[-1] + columns, t.shira_weight).view(t.shape)
