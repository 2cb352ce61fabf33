"""SHiRA: a few entries of the weight are trained, at fixed places."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.errors import TargetError
from adapters.methods.core.checks import is_integer, need, need_rank, need_seed
from adapters.methods.core.formulas import Additive
from adapters.methods.core.method import Tensors
from adapters.methods.core.spec import WeightSpec


@dataclass(frozen=True)
class SHiRA(Additive):
    """Sparse high-rank adaptation.

    Args:
        rank: How many entries are trained, as many as LoRA of this rank has: `rank · (outputs + inputs)`. The rank of
            the update is not limited by it.
        seed: Where the places come from, which are then the same in all layers of one shape. None draws others for
            each layer, by the seed of `inject`.

    Raises:
        AdapterError: A number is out of its range.
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

    def check_site(self, site: WeightSpec) -> None:
        outputs, inputs = site.shape[-2:]
        if self._count(site) > outputs * inputs:
            raise TargetError(
                f"{site.path} has {outputs * inputs} entries, {outputs} × {inputs}, and rank={self.rank} asks for"
                f" {self._count(site)}: give it a smaller rank."
            )

    def check_tensors(self, site: WeightSpec, tensors: Mapping[str, Tensor]) -> None:
        for places, size in zip(tensors["shira_indices"].long(), site.shape[-2:], strict=True):
            if places.numel() and not 0 <= int(places.min()) <= int(places.max()) < size:
                raise TargetError(f"shira_indices has places outside of {tuple(site.shape[-2:])}")

    def tensors(self, site: WeightSpec) -> dict[str, Tensor]:
        return {"shira_weight": site.zeros(*site.shape[:-2], self._count(site))}

    def constants(self, site: WeightSpec) -> dict[str, Tensor]:
        inputs, places = site.shape[-1], site.shuffled(self.seed)[: self._count(site)].sort().values
        return {"shira_indices": torch.stack([places // inputs, places % inputs]).to(site.device, torch.int32)}

    def _count(self, site: WeightSpec) -> int:
        return self.rank * sum(site.shape[-2:])

    def delta(self, t: Tensors) -> Tensor:
        rows, columns = t.shira_indices.long()
        flat = t.shira_weight.new_zeros(*t.shape[:-2], t.shape[-2] * t.shape[-1])
        return flat.index_add(-1, rows * t.shape[-1] + columns, t.shira_weight).view(t.shape)
